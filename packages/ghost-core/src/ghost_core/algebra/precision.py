"""Tolerances by dtype: what can be asked of gradients that are computed in one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from ghost_core.algebra.factors import Record
from ghost_core.algebra.gradients import PerSampleGradient


@dataclass(frozen=True)
class Precision:
    """What can be asked of gradients that are computed in some dtype.

    Attributes:
        tolerance: Error allowed, relative to the norm of the gradient.
        floor: Share of a sample's whole gradient. A parameter's gradient that is smaller is
            measured against this instead of its own norm: where larger numbers cancel, as they do
            for the bias of attention's keys, what is left is rounding.
    """

    tolerance: float
    floor: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype]) -> Precision:
        """Return what can be asked where several dtypes were used: what the narrowest allows."""
        narrowest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return PRECISIONS.get(narrowest, PRECISIONS[torch.bfloat16])


PRECISIONS = {
    torch.float64: Precision(1e-9, 1e-4),
    torch.float32: Precision(1e-4, 1e-3),
    torch.bfloat16: Precision(5e-2, 1e-2),
    torch.float16: Precision(5e-2, 1e-2),
}
"""Precision by dtype: of parameters, casts of these, inputs and gradients.

Below float64 the tolerance includes what the backward pass of the layer itself loses.
"""

INSIDE = 1e-5
"""Error of a layer that computes in float32 inside, as norms do, whatever dtype it is given."""

TF32 = 2.0**-7
"""Share of a row's largest entry by which float32 outputs may be off on other devices than CPUs."""


def floating_dtypes(kept: Record | PerSampleGradient) -> Iterator[torch.dtype]:
    """Yield the floating dtypes of the tensors in a record or gradient."""
    for value in vars(kept).values():
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value.dtype
        elif type(value) is not Size and isinstance(value, Record | PerSampleGradient):
            yield from floating_dtypes(value)
