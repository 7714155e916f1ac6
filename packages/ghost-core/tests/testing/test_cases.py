"""The table of layer configurations: that no two are the same, and what may be done with it."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    Dense,
    GradientSampler,
    PastCall,
    PerSampleGradient,
    Record,
    SamplerRegistry,
)
from ghost_core.testing import (
    LAYERS,
    VARIANTS,
    LayerExample,
    N,
    PlainEmbedding,
    PlainLinear,
    cases,
    check_example,
    check_layer,
    indices,
    normal,
    of_class,
    of_family,
    plain_registry,
    semantic_key,
)
from ghost_core.tracking import Claim, dotted_name

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(scope="module")
def keys() -> Mapping[Hashable, list[str]]:
    found = defaultdict(list)
    for name, example in LAYERS.items():
        found[semantic_key(example)].append(name)
    return found


def test_two_hundred_configurations_and_no_two_are_the_same(
    keys: Mapping[Hashable, list[str]],
) -> None:
    assert [names for names in keys.values() if len(names) > 1] == []
    exact = [example for example in LAYERS.values() if example.refusal is None]
    assert len(exact) >= 200
    assert len([example for example in exact if not example.generic]) >= 200


def test_sizes_do_not_count(keys: Mapping[Hashable, list[str]]) -> None:
    for name, example in VARIANTS.items():
        assert name not in LAYERS
        assert semantic_key(example) in keys, name
    larger = LayerExample("larger", lambda: nn.Conv2d(5, 9, 3), (normal(N, 5, 9, 8),), n=6)
    assert keys[semantic_key(larger)] == ["conv2d"]


@pytest.mark.parametrize(
    "other",
    [
        LayerExample("bias", lambda: nn.Linear(6, 7, bias=False), (normal(N, 3, 6),)),
        LayerExample("rank", lambda: nn.Linear(6, 7), (normal(N, 6),)),
        LayerExample("tokens", lambda: nn.Linear(6, 7), (normal(N, N, 6),)),
        LayerExample(
            "axis", lambda: nn.Linear(6, 7), (normal(3, N, 6),), options={"batch_dim": {"*": 1}}
        ),
        LayerExample("frozen", lambda: nn.Linear(6, 7), (normal(N, 3, 6),), frozen=("bias",)),
        LayerExample("keyword", lambda: nn.Linear(6, 7), kwargs={"input": normal(N, 3, 6)}),
        LayerExample(
            "layout",
            lambda: nn.Linear(6, 7),
            (lambda n, generator: normal(n, 6, 3)(n, generator).mT,),
        ),
    ],
    ids=lambda example: example.name,
)
def test_what_counts(other: LayerExample) -> None:
    example = LayerExample("linear", lambda: nn.Linear(6, 7), (normal(N, 3, 6),))
    assert semantic_key(other) != semantic_key(example)


def test_modes_and_sharing_count() -> None:
    def norm(training: bool) -> LayerExample:
        make = lambda: nn.BatchNorm1d(6).train(training)  # noqa: E731
        return LayerExample("norm", make, (normal(N, 6),))

    def linear(training: bool) -> LayerExample:
        return LayerExample("linear", lambda: nn.Linear(6, 7).train(training), (normal(N, 6),))

    def pair(tied: bool) -> LayerExample:
        def make() -> nn.Module:
            first, second = nn.Linear(6, 6), nn.Linear(6, 6)
            if tied:
                second.weight = first.weight
            return nn.Sequential(first, second)

        return LayerExample("pair", make, (normal(N, 6),))

    assert semantic_key(norm(True)) != semantic_key(norm(False))
    assert semantic_key(pair(True)) != semantic_key(pair(False))
    assert semantic_key(linear(True)) == semantic_key(linear(False))


def test_examples_are_found_by_class_and_family() -> None:
    assert "embedding, padding" in of_class(nn.Embedding)
    assert "linear" in of_class(nn.Linear, nn.Embedding)
    assert "linear, subclass" not in of_class(nn.Linear)
    assert {example.family for example in of_family("norm").values()} == {"norm"}
    with pytest.raises(ValueError, match=r"no family 'nrom'; there are .*norm"):
        of_family("nrom")


def test_models_and_inputs_are_the_same_every_time() -> None:
    state = torch.get_rng_state()
    example = LAYERS["linear, behind dropout in training"]
    for mine, other in zip(example.build().parameters(), example.build().parameters(), strict=True):
        assert torch.equal(mine, other)
        assert mine.dtype == torch.float64
    assert torch.equal(example.draw().args[0], example.draw().args[0])
    assert not torch.equal(example.draw().args[0], example.draw(seed=1).args[0])
    assert example.draw(9).args[0].shape == (9, 3, 6)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_table_needs_nothing_but_torch() -> None:
    folder = Path(cases.__file__).parent
    trees = [ast.parse(path.read_text()) for path in folder.glob("*.py")]
    imports = [node for tree in trees for node in ast.walk(tree)]
    names = [each.name for node in imports if isinstance(node, ast.Import) for each in node.names]
    names += [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    roots = {name.partition(".")[0] for name in names}
    assert roots - sys.stdlib_module_names == {"torch", "ghost_core"}


@pytest.mark.parametrize("name", ["linear", "linear, tokens", "linear, used twice", "embedding"])
def test_plain_samplers_are_exact_on_their_examples(name: str) -> None:
    check_example(LAYERS[name], registry=plain_registry())


class HalfBias(PlainLinear):
    """Forgets half of the tokens in the bias."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        made = dict(super().gradients(call, records, grads))
        if isinstance(bias := made.get("bias"), Dense):
            made["bias"] = Dense(bias.terms[:, ::2])
        return made


def claimed(sampler: type[GradientSampler]) -> SamplerRegistry:
    return SamplerRegistry([Claim(dotted_name(nn.Linear), sampler, "test")])


def test_a_wrong_sampler_is_found() -> None:
    check_example(LAYERS["linear"], registry=claimed(HalfBias))
    with pytest.raises(AssertionError, match=r"linear, tokens, bias, materialize: "):
        check_example(LAYERS["linear, tokens"], registry=claimed(HalfBias))


def test_what_is_not_refused_is_found() -> None:
    example = replace(LAYERS["linear"], refusal="no such reason")
    with pytest.raises(AssertionError, match="linear was not refused: 'no such reason'"):
        check_example(example, registry=plain_registry())
    example = replace(LAYERS["centred over the batch"], refusal="no such reason")
    with pytest.raises(AssertionError, match=r"(?s)refused for another reason .*mixes"):
        check_example(example, registry=plain_registry())


def test_layers_are_checked_in_several_shapes_and_tied() -> None:
    check_layer(
        PlainLinear,
        lambda: nn.Linear(6, 7),
        (normal(N, 6),),
        (normal(N, 3, 6),),
        (normal(N, N, 6),),
    )
    check_layer(PlainEmbedding, lambda: nn.Embedding(7, 5), (indices(N),), (indices(N, 6),))
    with pytest.raises(AssertionError, match=r"Linear\.bias"):
        check_layer(HalfBias, lambda: nn.Linear(6, 7), (normal(N, 6),), (normal(N, 3, 6),))


class OnlyFirst(PlainLinear):
    """Is wrong where another layer has the parameter too."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        made = super().gradients(call, records, grads)
        if call.name != "second":
            return made
        return {name: Dense(0 * each.materialize()[:, None]) for name, each in made.items()}


def test_a_sampler_that_fails_for_tied_layers_is_found() -> None:
    with pytest.raises(AssertionError, match="layers with one weight, "):
        check_layer(OnlyFirst, lambda: nn.Linear(6, 7), (normal(N, 6),))
