"""A fault in a sampler must make `check_sampler` fail, and the message must say where.

The faults are those that samplers had in earlier systems, one small subclass each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Size, Tensor, nn

from ghost_core import (
    Call,
    Dense,
    GradientSampler,
    InputFactor,
    Lookups,
    Outer,
    PastCall,
    PerSampleGradient,
    Record,
    Tokens,
    UnsupportedLayerError,
)
from ghost_core.testing import PlainEmbedding, PlainLayerNorm, PlainLinear, check_sampler

N, T, D, P = 4, 3, 5, 6


def sequence() -> Tensor:
    return torch.randn(N, T, D)


def token_ids() -> Tensor:
    ids = torch.randint(0, 7, (N, 6))
    ids[:, 1] = ids[:, 0]
    ids[:, 2] = 3
    return ids


# Samplers whose gradients have a fault in one operation


class SumTimesSum(Outer):
    """ΣA · ΣB instead of ΣAB."""

    def dot(self, directions: Tensor) -> Tensor:
        inputs, grads = self.factor.dense().sum(1), self.grad.sum(1)
        return torch.einsum("ngp,kpd,ngd->nk", grads, directions, inputs)


class NoCrossTerms(Outer):
    """Only meets itself."""

    def paired(self, other: PerSampleGradient) -> Tensor:
        return super().paired(other) if other is self else self.grad.new_zeros(self.n)


class NarrowDot(Outer):
    """Multiplies in bfloat16."""

    def dot(self, directions: Tensor) -> Tensor:
        gradients = self.materialize().flatten(1).bfloat16()
        return (gradients @ directions.flatten(1).bfloat16().mT).to(self.grad.dtype)


class NarrowResult(Outer):
    """Returns what it was given, in its own dtype."""

    def sum(self, weights: Tensor | None = None) -> Tensor:
        return super().sum(weights).to(self.grad.dtype)


class OneTokenShort(Outer):
    """Forgets the last token in token_dot."""

    def token_dot(self, directions: Tensor) -> Tensor:
        return super().token_dot(directions)[:, :-1]


class OneTokenLate(Outer):
    """Gives each token's dot to the next."""

    def token_dot(self, directions: Tensor) -> Tensor:
        return super().token_dot(directions).roll(1, 1)


class Unweighted(Outer):
    """Ignores weights."""

    def sum(self, weights: Tensor | None = None) -> Tensor:
        return super().sum()


class OneSided(Outer):
    """Projects the output side onto a map of its own."""

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        return super().project(None if left is None else left.roll(1, 1), right)


class WrongRows(Outer):
    """Narrows the output side only."""

    def narrow(self, samples: slice) -> Outer:
        count = len(range(*samples.indices(self.n)))
        return WrongRows(self.factor.narrow(slice(0, count)), self.grad[samples], self.shape)


class Asymmetric(Outer):
    """Sorts the rows of its Gram."""

    def gram(self, other: PerSampleGradient) -> Tensor:
        return super().gram(other).sort(0).values


class SeededLinear(PlainLinear):
    outer: type[Outer]

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        made = dict(super().gradients(call, records, grads))
        if "weight" in made:
            right = made["weight"]
            assert isinstance(right, Outer)
            made["weight"] = self.outer(right.factor, right.grad, right.shape)
        return made


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (SumTimesSum, r"Linear\.weight, dot, K=1: .* entries are off"),
        (NarrowDot, r"Linear\.weight, dot, K=1: .* entries are off"),
        (NarrowResult, r"Linear\.weight in torch\.bfloat16, sum: dtype torch\.bfloat16"),
        (OneTokenShort, r"Linear\.weight, token_dot summed over tokens, K=1: .* off"),
        (OneTokenLate, r"Linear\.weight, token_dot by token: .* off"),
        (Unweighted, r"Linear\.weight, sum with weights: .* off"),
        (OneSided, r"Linear\.weight, project\(left, right\): .* off"),
        (WrongRows, r"Linear\.weight, materialize after narrow\(1, None\): .* off"),
        (Asymmetric, r"Linear\.weight, gram with itself: .* off"),
    ],
)
def test_a_fault_in_an_operation(outer: type[Outer], message: str) -> None:
    sampler = type("Seeded", (SeededLinear,), {"outer": outer})
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler, nn.Linear(D, P), sequence())


def test_a_dropped_cross_term_between_uses() -> None:
    sampler = type("Seeded", (SeededLinear,), {"outer": NoCrossTerms})
    check_sampler(sampler, nn.Linear(D, P), sequence())
    with pytest.raises(AssertionError, match=r"Linear\.weight, paired: 4 of 4 entries are off"):
        check_sampler(sampler, nn.Linear(D, P), sequence(), uses=2)


# Samplers with a fault of their own


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


# Embeddings


class CountsPadding(PlainEmbedding):
    """Treats padding as any other row."""

    def record(self, call: Call) -> Mapping[str, Record]:
        return {
            name: record.replace(weight=None)
            for name, record in super().record(call).items()
            if isinstance(record, Lookups)
        }


class LastWins(Lookups):
    """Writes duplicates over one another."""

    def outer(self, grad: Tensor) -> Tensor:
        rows = grad[:, :, 0]
        table = rows.new_zeros(rows.shape[0], self.size, rows.shape[2])
        for token in range(rows.shape[1]):
            table[torch.arange(len(table)), self.index[:, token]] = rows[:, token]
        return table.mT.unsqueeze(1)


class OncePerRow(Lookups):
    """Meets every other row once."""

    def inner(self, other: InputFactor | Tensor, *, paired: bool) -> Tensor:
        same = super().inner(other, paired=paired)
        return torch.where(same.cumsum(-1) > 1, 0, same)


class SeededEmbedding(PlainEmbedding):
    rows: type[Lookups]

    def record(self, call: Call) -> Mapping[str, Record]:
        made = super().record(call)["weight"]
        assert isinstance(made, Lookups)
        return {"weight": self.rows(made.index, made.size, made.weight)}


def test_padding_that_counts() -> None:
    layer = nn.Embedding(7, P, padding_idx=3)
    check_sampler(PlainEmbedding, layer, token_ids(), uses=2)
    with pytest.raises(AssertionError, match=r"Embedding\.weight, materialize: .* off"):
        check_sampler(CountsPadding, layer, token_ids())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (LastWins, r"Embedding\.weight, materialize: .* entries are off"),
        (OncePerRow, r"Embedding\.weight, paired: .* entries are off"),
    ],
)
def test_duplicate_rows(rows: type[Lookups], message: str) -> None:
    sampler = type("Seeded", (SeededEmbedding,), {"rows": rows})
    check_sampler(PlainEmbedding, nn.Embedding(30, 40), token_ids(), uses=2)
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler, nn.Embedding(30, 40), token_ids())


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


# What the check itself refuses


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


@pytest.mark.parametrize(
    ("sampler", "layer", "inputs"),
    [
        (PlainLinear, nn.Linear(D, P), torch.randn(N, D)),
        (PlainLinear, nn.Linear(D, P), torch.randn(N, 2, T, D)),
        (PlainLinear, nn.Linear(D, P, bias=False), sequence()),
        (PlainLinear(), nn.Linear(D, 1), sequence()),
        (PlainEmbedding, nn.Embedding(7, P), torch.randint(0, 7, (N,))),
        (PlainEmbedding(), nn.Embedding(7, P), token_ids()),
        (PlainLayerNorm, nn.LayerNorm(D, bias=False), sequence()),
    ],
)
@pytest.mark.parametrize("uses", [1, 3])
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
