"""Steps in memory: what a caller appends, what a shard holds, and the tail that is not full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ghost_engines.store import StoreError
from ghost_engines.values import CreditedStep

Directions = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Steps:
    """Consecutive steps of a log.

    Attributes:
        numbers: Their numbers, int64 `[S]`, increasing.
        counts: How many samples each credited, int64 `[S]`.
        altered: Which of them had gradients that were changed in an unknown way: 0 or 1, int64
            `[S]`.
        ids: The samples of all, int64 `[M]`.
        values: What they were credited with, float64 `[M, K]`.
    """

    numbers: Tensor
    counts: Tensor
    altered: Tensor
    ids: Tensor
    values: Tensor

    @classmethod
    def of(cls, steps: Sequence[CreditedStep]) -> Self:
        """Put one or more steps together."""
        numbers = torch.tensor([each.step for each in steps], dtype=torch.int64)
        counts = torch.tensor([len(each.ids) for each in steps], dtype=torch.int64)
        altered = torch.tensor([each.altered for each in steps], dtype=torch.int64)
        values = [each.values for each in steps if len(each.ids)]
        return cls(
            numbers,
            counts,
            altered,
            torch.cat([each.ids for each in steps]),
            torch.cat(values) if values else torch.zeros(0, 0, dtype=torch.float64),
        )

    def __len__(self) -> int:
        """Return the number of steps S."""
        return len(self.numbers)

    def split(self, directions: Directions) -> Iterator[CreditedStep]:
        """Yield the steps one by one, as views."""
        start = 0
        values = self.values if len(self.ids) else self.values.new_zeros(0, len(directions))
        facts = (self.numbers.tolist(), self.counts.tolist(), self.altered.tolist())
        for number, count, altered in zip(*facts, strict=True):
            part = slice(start, start + count)
            yield CreditedStep(
                step=number,
                ids=self.ids[part],
                values=values[part],
                directions=directions,
                altered=bool(altered),
            )
            start += count

    def first(self, steps: int) -> Self:
        """Return the first steps of them, as views."""
        samples = int(self.counts[:steps].sum())
        return type(self)(
            self.numbers[:steps],
            self.counts[:steps],
            self.altered[:steps],
            self.ids[:samples],
            self.values[:samples],
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what a shard holds, by name."""
        return {
            "altered": self.altered,
            "counts": self.counts,
            "ids": self.ids,
            "steps": self.numbers,
            "values": self.values,
        }


@dataclass(frozen=True, eq=False)
class Tail:
    """The steps after the shards that are full on disk.

    It is never changed, only replaced, by one assignment: an interrupt finds the state before or
    after a step, and a write that is repeated writes the same shard again.

    Attributes:
        unit: The shard that the first of the steps opens.
        steps: The steps.
        size: Rows that they take: one for each, and one for each sample.
        written: How many of them are on disk.
    """

    unit: int
    steps: tuple[CreditedStep, ...] = ()
    size: int = 0
    written: int = 0

    @property
    def directions(self) -> Directions:
        """Names of the directions; none if no sample was credited."""
        return next((each.directions for each in self.steps if len(each.ids)), ())

    def with_step(self, step: CreditedStep) -> Self:
        """Return it with a step added."""
        size = self.size + 1 + len(step.ids)
        return type(self)(self.unit, (*self.steps, step), size, self.written)

    def saved(self, *, full: bool) -> Self:
        """Return what it is once its shard is on disk."""
        if full:
            return type(self)(self.unit + 1)
        return type(self)(self.unit, self.steps, self.size, len(self.steps))

    def written_out(self) -> Self:
        """Return it without the steps that are not on disk."""
        kept = self.steps[: self.written]
        return type(self)(self.unit, kept, sum(1 + len(each.ids) for each in kept), len(kept))


def checked(step: CreditedStep, last: int | None, directions: Directions) -> CreditedStep:
    """Return a copy of a step on the CPU.

    Args:
        step: The step.
        last: Number of the step before it.
        directions: Names of the directions so far, if any sample was credited.

    Raises:
        StoreError: If a number, shape or dtype does not fit.
    """
    if isinstance(step.step, bool) or not isinstance(step.step, int) or step.step < 1:
        raise StoreError(f"the number of a step must be a whole one from 1 on, not {step.step!r}")
    if last is not None and step.step <= last:
        raise StoreError(
            f"the log has steps up to {last}, and this is step {step.step}",
            reason="training was resumed from an earlier step, or counts its steps from 1 again",
            remedy="open the log with ScoreLog.resume(path, after=STEP), STEP being that of the "
            "checkpoint, which drops what came later; and load the state of the values, which "
            "counts steps",
        )
    n, names = len(step.ids), tuple(step.directions)
    for what, tensor, dtype, shape in (
        ("ids", step.ids, torch.int64, (n,)),
        ("values", step.values, torch.float64, (n, len(names))),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise StoreError(
                f"{what} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
            )
    if n and directions and names != directions:
        raise StoreError(
            f"step {step.step} has directions {', '.join(names) or 'of no name'}; those of the log "
            f"are {', '.join(directions)}",
            reason="sums by sample would lack some of them",
            remedy="make another log for other directions",
        )
    return CreditedStep(
        step=step.step,
        ids=step.ids.detach().to("cpu", copy=True),
        values=step.values.detach().to("cpu", copy=True),
        directions=names,
        altered=bool(step.altered),
    )
