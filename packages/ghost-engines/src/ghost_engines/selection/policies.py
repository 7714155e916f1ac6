"""The policies that ghost ships: the best, all that are good enough, a good mixture, any."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from ghost_core import CaptureError, Policy
from ghost_core.arguments import whole


@dataclass(frozen=True)
class TopK(Policy):
    """The k candidates with the largest dots, best first; of equal ones the earlier.

    Attributes:
        k: How many; all candidates, if there are fewer.
    """

    k: int

    def __post_init__(self) -> None:
        whole("k", self.k, least=1)

    def choose(self, dots: Tensor, gram: Tensor | None) -> Tensor:
        """Return positions, best first."""
        return dots.argsort(descending=True, stable=True)[: self.k]


@dataclass(frozen=True)
class Threshold(Policy):
    """All candidates with a dot larger than a value, best first; there may be none.

    Attributes:
        value: In units of a dot: a product of gradients. With 0, those of which a small step does
            not harm.
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        _finite("value", self.value)

    def choose(self, dots: Tensor, gram: Tensor | None) -> Tensor:
        """Return positions, best first."""
        order = dots.argsort(descending=True, stable=True)
        return order[dots[order] > self.value]


@dataclass(frozen=True)
class Greedy(Policy):
    """The k candidates that help together: one after the other, whichever gains most beside those.

    Two samples with the same gradient have the same dot, and the second helps less than the first.
    As in GREATS (Wang et al., 2024, "Greedy Approximation Taylor Selection"), what n gains beside a
    set S is expanded to second order, with the identity in place of the Hessian:

        lr ⟨g_n, v⟩ - lr² Σ_{m in S} ⟨g_n, g_m⟩

    Attributes:
        k: How many; all candidates, if there are fewer.
        lr: What a candidate's own gradient is multiplied with in the step: the learning rate, or
            the learning rate / k where the loss is the mean over those that are chosen. With 0,
            the order is that of `TopK`.
    """

    needs_gram: ClassVar[bool] = True

    k: int
    lr: float

    def __post_init__(self) -> None:
        whole("k", self.k, least=1)
        _finite("lr", self.lr)
        if self.lr < 0:
            raise CaptureError(f"lr must be a learning rate from 0 on, not {self.lr}")

    def choose(self, dots: Tensor, gram: Tensor | None) -> Tensor:
        """Return positions, in the order of choice; of equal gains the earlier."""
        assert gram is not None
        gains = dots.clone()  # over lr
        order = torch.empty(min(self.k, len(dots)), dtype=torch.int64)
        for place in range(len(order)):
            order[place] = best = int(gains.argmax())
            gains -= self.lr * gram[best]
            gains[order[: place + 1]] = -torch.inf
        return order


@dataclass(frozen=True)
class Random(Policy):
    """k candidates at random, which other policies are compared with at equal samples.

    They are drawn from torch's random number generator, so that `torch.manual_seed` repeats them,
    and a `Run` that is resumed goes on with them.

    Attributes:
        k: How many; all candidates, if there are fewer.
    """

    needs_dots: ClassVar[bool] = False

    k: int

    def __post_init__(self) -> None:
        whole("k", self.k, least=1)

    def choose(self, dots: Tensor, gram: Tensor | None) -> Tensor:
        """Return positions, in the order that they were drawn in."""
        return torch.randperm(len(dots))[: self.k]


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise CaptureError(f"{name} must be a finite number, not {value!r}")
