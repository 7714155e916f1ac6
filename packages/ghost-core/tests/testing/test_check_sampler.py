"""What `check_sampler` cannot check is an error, and samplers without faults pass it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ghost_core import GradientSampler, UnsupportedLayerError
from ghost_core.testing import PlainEmbedding, PlainLayerNorm, PlainLinear, check_sampler

from .inputs import D, N, P, T, sequence, token_ids


class Blocked(nn.Linear):
    """Stops its own gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0


@dataclass
class Case:
    """Inputs that do not make up a test."""

    layer: nn.Module
    inputs: Tensor
    error: type[Exception]
    message: str


@pytest.mark.parametrize(
    "case",
    [
        Case(
            Blocked(D, P),
            sequence(),
            AssertionError,
            "Blocked.weight, materialize: the reference is zero",
        ),
        Case(nn.Linear(D, P), sequence()[:1], ValueError, "at least two samples"),
        Case(nn.LayerNorm((T, D)), sequence(), UnsupportedLayerError, "only the last axis"),
    ],
    ids=["zero reference", "one sample", "refused"],
)
def test_what_cannot_be_checked_is_an_error(case: Case) -> None:
    sampler = PlainLayerNorm if isinstance(case.layer, nn.LayerNorm) else PlainLinear
    with pytest.raises(case.error, match=case.message):
        check_sampler(sampler, case.layer, case.inputs)


def test_a_layer_that_mixes_samples_is_refused() -> None:
    class Centred(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            return output - output.mean(0)

    with pytest.raises(AssertionError, match=r"Centred\.weight, materialize: .* off"):
        check_sampler(PlainLinear, Centred(D, P), sequence())


SOUND = [
    (PlainLinear, nn.Linear(D, P), torch.randn(N, D)),
    (PlainLinear, nn.Linear(D, P), torch.randn(N, 2, T, D)),
    (PlainLinear, nn.Linear(D, P, bias=False), sequence()),
    (PlainLinear(), nn.Linear(D, 1), sequence()),
    (PlainEmbedding, nn.Embedding(7, P), torch.randint(0, 7, (N,))),
    (PlainEmbedding(), nn.Embedding(7, P), token_ids()),
    (PlainLayerNorm, nn.LayerNorm(D, bias=False), sequence()),
]


@pytest.mark.parametrize(
    ("sampler", "layer", "inputs", "uses"),
    [  # by default, each layer in one of both ways
        pytest.param(*each, uses, marks=() if at % 2 == uses // 2 else pytest.mark.stress)
        for at, each in enumerate(SOUND)
        for uses in (1, 3)
    ],
)
def test_samplers_without_faults_pass(
    sampler: GradientSampler, layer: nn.Module, inputs: Tensor, uses: int
) -> None:
    before = [parameter.clone() for parameter in layer.parameters()]
    state = torch.get_rng_state()
    check_sampler(sampler, layer, inputs, uses=uses)
    assert torch.equal(state, torch.get_rng_state())
    for parameter, copy in zip(layer.parameters(), before, strict=True):
        assert torch.equal(parameter, copy)
        assert parameter.grad is None
        assert parameter.requires_grad
    assert not layer._forward_hooks
