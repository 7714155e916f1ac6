"""How an engine under test gets its batches: alone, or joined with samples of validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ghost_core import Batch, Engine

LossesOf = Callable[[Tensor], Tensor]
"""Runs the model on token ids `[N, T]`, and returns the losses `[N]`."""


class Feed(Protocol):
    """Runs batches of a training loop, with engines and without."""

    def run(
        self,
        engines: Sequence[Engine[Any]],
        parts: Sequence[Tensor],
        ids: Tensor,
        losses_of: LossesOf,
        weight: float,
    ) -> list[Batch[Any]]:
        """Run forward and backward passes.

        Args:
            engines: The engines that are attached; without any, it is plain training.
            parts: Token ids of each micro-batch, `[n, T]`.
            ids: Ids of all their samples.
            losses_of: Runs the model.
            weight: What each loss of training is multiplied with.

        Returns:
            The batches that were opened last, of each engine.
        """
        ...


class Alone:
    """Training samples alone, all micro-batches in one batch."""

    def run(
        self,
        engines: Sequence[Engine[Any]],
        parts: Sequence[Tensor],
        ids: Tensor,
        losses_of: LossesOf,
        weight: float,
    ) -> list[Batch[Any]]:
        """Run forward and backward passes; see `Feed`."""
        with ExitStack() as stack:
            batches = [stack.enter_context(engine.batch(ids)) for engine in engines]
            for part in parts:
                (weight * losses_of(part).sum()).backward()
        return batches


@dataclass(frozen=True)
class Joined:
    """Training samples with others of validation behind them, each micro-batch in a batch.

    Attributes:
        validation: Number of validation samples M.
        validation_weight: What each of their losses is multiplied with.
    """

    validation: int = 2
    validation_weight: float = 0.5

    def run(
        self,
        engines: Sequence[Engine[Any]],
        parts: Sequence[Tensor],
        ids: Tensor,
        losses_of: LossesOf,
        weight: float,
    ) -> list[Batch[Any]]:
        """Run forward and backward passes; see `Feed`.

        Without an engine the model sees the same samples, so that its random numbers are the same,
        and the losses of validation are left out.
        """
        batches: list[Batch[Any]] = []
        for part, own in zip(parts, _split(ids, parts), strict=True):
            others = part[: self.validation].flip(1)
            if not engines:
                losses = losses_of(torch.cat([part, others]))
                (weight * losses[: len(part)].sum()).backward()
                continue
            (engine,) = engines
            both = join(engine, part, others)
            with engine.batch(own) as batch:
                self.backward(engine, losses_of(both), weight)
            batches = [batch]
        return batches

    def backward(self, engine: Any, losses: Tensor, weight: float = 1.0) -> None:
        """Let an engine backpropagate the losses of both."""
        engine.backward(losses, train_weight=weight, validation_weight=self.validation_weight)


def join(engine: Any, train: Tensor, validation: Tensor, dim: int = 0) -> Tensor:
    """Let an engine join two batches, whose samples are on axis `dim`.

    Raises:
        AssertionError: If it has no methods for that, or joins them in another way.
    """
    for method in ("concatenate", "backward"):
        if not callable(getattr(engine, method, None)):
            raise AssertionError(
                f"{type(engine).__name__} has no method {method}(), which an engine needs that "
                "scores the samples of a batch against others in it"
            )
    both: Tensor = engine.concatenate(train, validation)
    if not torch.equal(both, torch.cat([train, validation], dim)):
        raise AssertionError("concatenate() is to put the validation samples behind the others")
    return both


def _split(ids: Tensor, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from ids.split([len(part) for part in parts])
