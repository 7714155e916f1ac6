"""Every layer configuration of the public table, through both engines, against autograd."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core.testing import (
    LAYERS,
    VARIANTS,
    Inputs,
    LayerExample,
    dense,
    losses,
    per_sample_gradients,
)
from ghost_engines import DotProductEngine, ProjectionEngine

Directions = Mapping[str, Mapping[str, Tensor]]

EXACT = {n: example for n, example in (LAYERS | VARIANTS).items() if example.refusal is None}


def marked(name: str) -> object:
    """Leave to the stress tests what engines get in a form that they get from others, too.

    What is replayed, and takes long; what is there in another size; convolutions along one or
    three axes, where those along two are there; several options at once that are there alone; and
    what only the layer's own formula sees, which the tests of the layers check for each.
    """
    layer, *options = name.split(", ")
    each_alone = len(options) > 1 and all(f"{layer}, {each}" in EXACT for each in options)
    along_two = re.sub("conv[13]d", "conv2d", name)
    again = EXACT[name].generic or name in VARIANTS or (along_two != name and along_two in EXACT)
    return pytest.param(
        name, marks=pytest.mark.stress if again or each_alone or INSIDE.search(name) else ()
    )


INSIDE = re.compile(
    "|".join(
        [
            r"^conv\dd, (stride|padding|valid|same|dilation|reflect|replicate|circular|kernel)",
            r"^conv\dd, (along one axis|channels last, groups|groups, stride|depthwise,)",
            r"^embedding, (max_norm|int32|keyword|subclass|sparse, padding|not contiguous)",
            r"^embedding, (two|three) axes of tokens",
            r"^embedding bag, .*(max_norm|sparse|int32|by position|include_last|as many entries)",
            r"^rms norm, |[013] spatial axes|norm [13]d",
            r"^linear, .*axes of tokens|^linear, (input by keyword|subclass|of multi-head|sorted)",
        ]
    )
)
"""Names of examples that differ in how the layer computes, not in what engines get of it."""


@pytest.fixture(params=map(marked, EXACT))
def example(request: pytest.FixtureRequest) -> LayerExample:
    return EXACT[request.param]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_dots_and_rows_are_those_of_autograd(
    example: LayerExample,
    assert_scores: Callable[..., None],
    assert_rows: Callable[..., None],
    draw_directions: Callable[..., Directions],
) -> None:
    model = example.build()
    directions, gradients = draw_directions(model, 2), reference(example)
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    plain = trained(example, example.build(), drawn(example, leaves=True))

    scoring = example.build()
    engine = dot_products(example, scoring, directions)
    with engine, engine.batch(range(example.n)) as scores:
        inputs = trained(example, scoring, drawn(example, leaves=True))
    assert scores.verified
    assert_scores(scores.result, gradients, directions)
    assert_same(plain, inputs)

    projecting = example.build()
    rows_engine = projections(example, projecting)
    with rows_engine, rows_engine.batch(range(example.n)) as rows:
        inputs = trained(example, projecting, drawn(example, leaves=True))
    assert_rows(rows_engine, rows.result, gradients)
    assert_same(plain, inputs)

    frozen = example.build()
    engine, rows_engine = dot_products(example, frozen, directions), projections(example, frozen)
    with (
        engine.frozen(),
        rows_engine.frozen(),
        engine.batch(range(example.n)) as scores,
        rows_engine.batch(range(example.n)) as rows,
    ):
        trained(example, frozen, drawn(example, leaves=False))
    assert_scores(scores.result, gradients, directions)
    assert_rows(rows_engine, rows.result, gradients)
    assert all(parameter.grad is None for parameter in frozen.parameters())


def dot_products(
    example: LayerExample, model: nn.Module, directions: Directions
) -> DotProductEngine:
    engine = DotProductEngine(model, **example.options)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    return engine


def projections(example: LayerExample, model: nn.Module) -> ProjectionEngine:
    engine = ProjectionEngine(model, dim=12, min_dim=3, dtype="float64", **example.options)
    smaller = [block.size < block.shape.numel() for block in engine.layout]
    assert any(smaller) or all(block.shape.numel() <= 12 for block in engine.layout)
    return engine


def drawn(example: LayerExample, *, leaves: bool) -> Inputs:
    """Draw inputs; as leaves, floating ones require gradients."""
    inputs = example.draw()
    for leaf in tree_leaves(inputs[:2]):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_(leaves)
    return inputs


def reference(example: LayerExample) -> dict[str, Tensor]:
    """Ask autograd for each sample's gradient; that of a scalar is `[N, 1]`."""
    model = dense(example.build())
    gradients = per_sample_gradients(model, losses(example, model, example.draw()))
    return {name: each if each.dim() > 1 else each[:, None] for name, each in gradients.items()}


def trained(example: LayerExample, model: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    """Run forward and backward; return all `.grad`, of parameters and of inputs."""
    losses(example, model, inputs).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    tensors = [leaf for leaf in tree_leaves(inputs[:2]) if isinstance(leaf, Tensor)]
    return gradients | {f"input {at}": leaf.grad for at, leaf in enumerate(tensors)}


def assert_same(plain: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None]) -> None:
    assert plain.keys() == found.keys()
    for name, wanted in plain.items():
        got = found[name]
        if wanted is None or got is None:
            assert got is wanted, f"{name}.grad is not that of plain training"
        else:
            same = torch.equal(got.to_dense(), wanted.to_dense())
            assert same, f"{name}.grad is not that of plain training"


def test_the_table_has_cases_with_as_many_tokens_as_samples() -> None:
    """There an engine that takes one for the other could go unnoticed, but for the values."""
    assert len([name for name in EXACT if "as many" in name]) >= 20
