"""A fault in a sampler must make `check_sampler` fail, and the message must say where.

The faults are those that samplers had in earlier systems, one small subclass each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Size, Tensor, nn

from ghost_core import (
    Call,
    Dense,
    GradientSampler,
    Lookups,
    Outer,
    PastCall,
    PerSampleGradient,
    Record,
    Tokens,
)
from ghost_core.testing import PlainEmbedding, PlainLayerNorm, PlainLinear, check_sampler

from .inputs import D, N, P, sequence, token_ids


class Narrow(PlainLinear):
    """Casts everything to bfloat16."""

    def record(self, call: Call) -> Mapping[str, Record]:
        return {
            name: record.replace(x=record.x.bfloat16().to(record.x.dtype))
            for name, record in super().record(call).items()
            if isinstance(record, Tokens)
        }


class SwappedInput(PlainLinear):
    """Takes tokens for samples, in the input."""

    def record(self, call: Call) -> Mapping[str, Record]:
        return {
            name: record.replace(x=record.x.transpose(0, 1))
            for name, record in super().record(call).items()
            if isinstance(record, Tokens)
        }


class Swapped(PlainLinear):
    """Takes tokens for samples."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        (grad,) = grads
        assert grad is not None
        swapped = {
            name: record.replace(x=record.x.transpose(0, 1))
            for name, record in records.items()
            if isinstance(record, Tokens)
        }
        return super().gradients(call, swapped, [grad.transpose(0, 1)])


class SumTimesSumEverywhere(PlainLinear):
    """Sums over tokens too early, in input and gradient."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        made = dict(super().gradients(call, records, grads))
        if isinstance(outer := made.get("weight"), Outer):
            inputs = Tokens(outer.factor.dense().sum(1, keepdim=True))
            made["weight"] = Outer(inputs, outer.grad.sum(1, keepdim=True), outer.shape)
        return made


class AlwaysWeight(PlainLinear):
    """Returns gradients that were not asked for."""

    def record(self, call: Call) -> Mapping[str, Record]:
        call.shapes.setdefault("weight", Size((P, D)))
        return super().record(call)


class NeedsBoth(PlainLinear):
    """Relies on the weight being asked for."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        assert records["weight"]
        return super().gradients(call, records, grads)


class Squeezes(PlainLinear):
    """Loses the sample axis of a single sample."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        (grad,) = grads
        assert grad is not None
        return super().gradients(call, records, [grad.squeeze(0)])


class DividesByCount(PlainLinear):
    """Cannot do without samples."""

    def record(self, call: Call) -> Mapping[str, Record]:
        assert call.outputs[0].abs().max() >= 0
        return super().record(call)


class Meddles(PlainLinear):
    """Changes the gradient that flows on."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        made = super().gradients(
            call, records, [grad.clone() for grad in grads if grad is not None]
        )
        for grad in grads:
            if grad is not None:
                grad.mul_(2)
        return made


class IgnoresCompression(PlainLinear):
    """Keeps the input for itself beside the record."""

    def record(self, call: Call) -> Mapping[str, Record]:
        records = super().record(call)
        call.static = records.get("weight")
        return records

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        return super().gradients(call, {**records, "weight": call.static}, grads)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Narrow, r"Linear\.weight, materialize: .* entries are off"),
        (SwappedInput, r"SwappedInput in the backward pass: RuntimeError: "),
        (Swapped, r"Swapped in the backward pass: CaptureError: Swapped returned 3 gradients"),
        (SumTimesSumEverywhere, r"Linear\.weight, materialize: .* entries are off"),
        (AlwaysWeight, r"AlwaysWeight in the forward pass with only bias trainable: KeyError"),
        (NeedsBoth, r"NeedsBoth in the backward pass with only bias trainable: KeyError"),
        (Squeezes, r"Squeezes in the backward pass for one sample: "),
        (DividesByCount, r"DividesByCount in the forward pass for no sample: "),
        (Meddles, r"Linear: gradients of parameters or inputs differ"),
        (IgnoresCompression, r"Linear\.weight, project after compression: "),
    ],
)
def test_a_fault_in_a_linear_sampler(sampler: type[GradientSampler], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler, nn.Linear(D, P), sequence())


@pytest.mark.parametrize("sampler", [SwappedInput, Swapped])
def test_a_swapped_axis_where_all_shapes_fit(sampler: type[GradientSampler]) -> None:
    with pytest.raises(AssertionError, match=r"Linear\.\w+, materialize: .* entries are off"):
        check_sampler(sampler, nn.Linear(D, P), torch.randn(N, N, D))


class Transposed(nn.Module):
    """A linear layer with its weight as `[d, p]`."""

    def __init__(self, d: int, p: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, p))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


class HandlesTransposed(PlainLinear):
    parameters = ("weight",)

    def record(self, call: Call) -> Mapping[str, Record]:
        return {
            name: record.replace(transposed=True)
            for name, record in super().record(call).items()
            if isinstance(record, Tokens)
        }


class IgnoresTransposition(PlainLinear):
    parameters = ("weight",)


def test_an_ignored_transposition() -> None:
    check_sampler(HandlesTransposed, Transposed(D, D), sequence(), uses=2)
    check_sampler(HandlesTransposed, Transposed(D, P), sequence())
    with pytest.raises(AssertionError, match=r"Transposed\.weight, materialize: .* entries are"):
        check_sampler(IgnoresTransposition, Transposed(D, D), sequence())
    with pytest.raises(AssertionError, match=r"Transposed\.weight, \w+"):
        check_sampler(IgnoresTransposition, Transposed(D, P), sequence())


class CountsPadding(PlainEmbedding):
    """Treats padding as any other row."""

    def record(self, call: Call) -> Mapping[str, Record]:
        return {
            name: record.replace(weight=None)
            for name, record in super().record(call).items()
            if isinstance(record, Lookups)
        }


def test_padding_that_counts() -> None:
    layer = nn.Embedding(7, P, padding_idx=3)
    check_sampler(PlainEmbedding, layer, token_ids(), uses=2)
    with pytest.raises(AssertionError, match=r"Embedding\.weight, materialize: .* off"):
        check_sampler(CountsPadding, layer, token_ids())


class PerFeature(PlainLayerNorm):
    """Leaves gradients `[N, T, d]` summed over the wrong axis."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        return {
            name: Dense(gradient.terms.cumsum(1))
            for name, gradient in super().gradients(call, records, grads).items()
            if isinstance(gradient, Dense)
        }


def test_norms() -> None:
    layer = nn.LayerNorm(D)
    check_sampler(PlainLayerNorm, layer, sequence(), uses=2)
    with pytest.raises(AssertionError, match=r"LayerNorm\.weight, materialize: .* off"):
        check_sampler(PerFeature, layer, sequence())
