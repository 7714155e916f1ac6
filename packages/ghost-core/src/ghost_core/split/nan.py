"""Finds NaN and infinite numbers, which hide what a probe looks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def any_nan(values: Iterable[Any]) -> bool:
    """Tell whether there is NaN in any tensor; infinity is what masks are made of."""
    return any(
        isinstance(each, Tensor) and each.is_floating_point() and has_nan(each) for each in values
    )


def has_nan(value: Tensor) -> bool:
    """Tell whether there is NaN in a tensor: its largest entry is then, whatever else there is."""
    if value.itemsize == 1:  # of which torch finds no largest
        return bool(value.isnan().any())
    return bool(value.numel()) and bool(value.amax().isnan())


def is_finite(value: Tensor) -> bool:
    """Tell whether all numbers of a tensor are finite."""
    return not value.numel() or bool(value.abs().amax().isfinite())
