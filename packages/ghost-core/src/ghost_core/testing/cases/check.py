"""Compares every operation on what is captured of an example with autograd."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ghost_core.errors import GhostError, UnbalancedError
from ghost_core.sampler import GradientSampler
from ghost_core.testing.cases.example import Draw, Inputs, LayerExample, losses
from ghost_core.testing.holder import GradientHolder
from ghost_core.testing.operations import Gradients, check_operations
from ghost_core.testing.oracle import per_sample_gradients
from ghost_core.testing.samplers import check_sampler
from ghost_core.tracking import Claim, SamplerRegistry, dotted_name


def check_example(
    example: LayerExample,
    *,
    registry: SamplerRegistry | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Assert that ghost is exact on an example, or refuses it with the reason expected.

    Every operation on the per-sample gradients of every trainable parameter is compared with
    autograd, run sample by sample in float64; Grams also with a batch of one sample fewer. The
    split by sample is verified in both.

    Args:
        example: An example, such as one of `LAYERS`.
        registry: Where samplers are found; by default those of all installed plugins.
        tolerance: Error allowed relative to the norms of what is multiplied.

    Raises:
        AssertionError: Naming example, parameter, operation, worst entry, error and bound; or
            that the example was not refused, or for another reason.
        GhostError: If it was refused and should not be.
    """
    if example.refusal is not None:
        _check_refused(example, registry)
        return
    sizes = [example.n, max(1, example.n - 1)]
    try:
        first, second = capture(example, sizes, registry)
    except UnbalancedError:  # whose cause the comparison with autograd shows in detail
        first, second = capture(example, sizes, registry, verify=False)
    for name, gradients in first.items():
        what = f"{example.name}, {name}"
        if not gradients.expected.any():
            raise AssertionError(f"{what}: the reference is zero, so nothing would be tested")
        check_operations(gradients, second[name], tolerance=tolerance, what=what)


def capture(
    example: LayerExample,
    sizes: Sequence[int],
    registry: SamplerRegistry | None = None,
    *,
    verify: bool = True,
) -> list[dict[str, Gradients]]:
    """Return what ghost finds in batches of an example, beside what it should find.

    Args:
        example: The example.
        sizes: Number of samples of each batch. One engine captures them all.
        registry: Where samplers are found; by default those of all installed plugins.
        verify: Whether the split by sample is verified.

    Returns:
        For each batch, gradients by parameter name, to be compared by `check_operations`.

    Raises:
        AssertionError: If a parameter is missing, or no gradient arrived for it.
        GhostError: If ghost refuses the example.
    """
    module = example.build()
    engine = GradientHolder(module, registry=registry, verify=verify, **example.options)
    with engine:
        return [_captured(example, engine, n) for n in sizes]


def check_layer(
    sampler: type[GradientSampler],
    make: Callable[[], nn.Module],
    *inputs: tuple[Draw, ...],
    n: int = 4,
) -> None:
    """Run `check_sampler` on inputs of several shapes, for one use and two, and on tied layers.

    For a linear layer, with as many tokens as samples in the last:

        check_layer(LinearSampler, lambda: nn.Linear(6, 7), (normal(N, 6),), (normal(N, N, 6),))

    Args:
        sampler: The sampler's class.
        make: Makes the layer, of the very class that the sampler handles.
        inputs: Draws of the positional inputs, samples on axis 0; see `normal` and `indices`.
        n: Number of samples N.

    Raises:
        AssertionError: Naming parameter, operation, worst entry, error and bound.
        GhostError: If the layer or a call is refused.
    """
    claim = Claim(dotted_name(type(make())), sampler, "ghost_core.testing")
    for draws in inputs:
        example = LayerExample("layer", make, draws, n=n)
        for uses in (1, 2):
            check_sampler(sampler, example.build(), *example.draw().args, uses=uses)
        for name, _ in make().named_parameters(recurse=False):
            tied = replace(
                example, name=f"layers with one {name}", make=partial(_Siblings, make, name)
            )
            check_example(tied, registry=SamplerRegistry([claim]))


class _Siblings(nn.Module):
    """Calls two layers, which have one parameter in common, on the same inputs."""

    def __init__(self, make: Callable[[], nn.Module], name: str) -> None:
        super().__init__()
        self.first, self.second = make(), make()
        setattr(self.second, name, getattr(self.first, name))

    def forward(self, *inputs: Any) -> tuple[Any, Any]:
        """Return both outputs."""
        return self.first(*inputs), self.second(*inputs)


def _leaves(example: LayerExample, n: int) -> Inputs:
    """Draw inputs, of which floating ones require gradients."""
    inputs = example.draw(n, seed=n)
    for leaf in tree_leaves(inputs[:2]):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            leaf.requires_grad_()
    return inputs


def dense(module: nn.Module) -> nn.Module:
    """Let tables make dense gradients, which are the same numbers: for autograd's own calls."""
    for each in module.modules():
        if isinstance(each, nn.Embedding | nn.EmbeddingBag):
            each.sparse = False
    return module


def _captured(example: LayerExample, engine: GradientHolder, n: int) -> dict[str, Gradients]:
    # Before the call, which may change buffers and, for a table with `max_norm`, parameters.
    twin = dense(copy.deepcopy(engine.model))
    with engine.batch(range(n)) as batch:
        losses(example, engine.model, _leaves(example, n)).sum().backward()
    if engine.verifies and not batch.verified:
        raise AssertionError(f"{example.name}: the batch was not verified")
    expected = per_sample_gradients(twin, losses(example, twin, _leaves(example, n)))
    uses = batch.result.uses
    if uses.keys() != expected.keys():
        raise AssertionError(f"{example.name}: {sorted(uses)}, expected {sorted(expected)}")
    if missing := [name for name, arrived in uses.items() if not arrived]:
        raise AssertionError(f"{example.name}: no gradient arrived for {', '.join(missing)}")
    return {
        name: Gradients([use.gradient for use in uses[name]], gradient)
        for name, gradient in expected.items()
    }


def _check_refused(example: LayerExample, registry: SamplerRegistry | None) -> None:
    assert example.refusal is not None
    try:
        capture(example, [example.n], registry)
    except GhostError as error:
        if not re.search(example.refusal, str(error)):
            raise AssertionError(
                f"{example.name} was refused for another reason than {example.refusal!r}: {error}"
            ) from error
    else:
        raise AssertionError(f"{example.name} was not refused: {example.refusal!r} was expected")
