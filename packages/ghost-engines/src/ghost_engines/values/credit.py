"""What a step of the optimizer credits to the samples it was made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class CreditedStep:
    """What one step credited, before it is added to what others did.

    Attributes:
        step: Number of the step, from 1.
        ids: Sample ids, int64 `[N]` on the CPU: those of all batches that the step was made with,
            in their order. An id may be there several times, and N may be zero.
        values: What each was credited with, float64 `[N, K]` on the CPU.
        directions: Names of the K directions.
        altered: Whether gradients were changed between the batches and the step in a way that the
            values do not know: other than by a factor.
    """

    step: int
    ids: Tensor
    values: Tensor
    directions: tuple[str, ...]
    altered: bool = False


OnCredit = Callable[[CreditedStep], object]
"""Is told of each step that was made."""
