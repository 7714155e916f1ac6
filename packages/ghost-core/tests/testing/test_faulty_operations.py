"""A fault in one operation on gradients must make `check_sampler` fail, and say which.

The faults are those that samplers had in earlier systems, one small subclass each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ghost_core import Call, InputFactor, Lookups, Outer, PastCall, PerSampleGradient, Record
from ghost_core.algebra import Reduced
from ghost_core.testing import PlainEmbedding, PlainLinear, check_sampler

from .inputs import D, P, sequence, token_ids


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


class LastNotAdded(Outer):
    """Leaves a sample out of the sum that comes with dots."""

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        found = super().reduce(directions, norms=norms, total=total)
        return replace(found, total=self.narrow(slice(0, -1)).sum()) if total else found


class FirstDirection(Outer):
    """Multiplies what it builds with one direction only."""

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        if directions is not None:
            directions = directions[:1].expand_as(directions)
        return super().reduce(directions, norms=norms, total=total)


class NormOfSum(Outer):
    """Takes the sum's norm for that of each sample."""

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        found = super().reduce(directions, norms=norms, total=total)
        squared = self.sum().square().sum().expand(self.n)
        return replace(found, squared_norms=squared) if norms else found


class Unasked(Outer):
    """Returns what was not asked for."""

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        return super().reduce(directions, norms=norms, total=True)


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
        (LastNotAdded, r"Linear\.weight, sum of reduce, K=1.*: .* off"),
        (FirstDirection, r"Linear\.weight, dots of reduce, K=3.*: .* off"),
        (NormOfSum, r"Linear\.weight, norms of reduce, K=1.*: .* off"),
        (Unasked, r"Linear\.weight, reduce, K=2.*: something else than asked for came"),
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


class NormsByToken(Lookups):
    """Adds up squares of tokens that share a row."""

    def squared_norms(self, grad: Tensor) -> Tensor:
        return grad.square().sum((1, 2, 3))


class SeededEmbedding(PlainEmbedding):
    rows: type[Lookups]

    def record(self, call: Call) -> Mapping[str, Record]:
        made = super().record(call)["weight"]
        assert isinstance(made, Lookups)
        return {"weight": self.rows(made.index, made.size, made.weight)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (LastWins, r"Embedding\.weight, materialize: .* entries are off"),
        (OncePerRow, r"Embedding\.weight, gram with itself: .* entries are off"),
        (NormsByToken, r"Embedding\.weight, paired: .* entries are off"),
    ],
)
def test_duplicate_rows(rows: type[Lookups], message: str) -> None:
    sampler = type("Seeded", (SeededEmbedding,), {"rows": rows})
    check_sampler(PlainEmbedding, nn.Embedding(30, 40), token_ids(), uses=2)
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler, nn.Embedding(30, 40), token_ids())
