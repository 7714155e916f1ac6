"""What a data set's store has beside the rows, and the functions that say it of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import numpy as np
from torch import Tensor

from ghost_core import CaptureError

ColumnOf = Callable[[Tensor], Any]
"""Returns, for sample ids int64 `[n]`, a tensor or array `[n]`, or n strings."""


def check_columns(columns: Any, filled: Iterable[str]) -> None:
    """Refuse what is no mapping of names to a dtype and a function of sample ids.

    Args:
        columns: What was given.
        filled: Names of columns that hold what a pass computes.

    Raises:
        CaptureError: If it is none, or has one of these names.
    """
    example = 'give them as in columns={"group": ("category", corpus.groups)}'
    if not isinstance(columns, Mapping):
        raise CaptureError(f"columns is a {type(columns).__name__}", remedy=example)
    for name, given in columns.items():
        if not (isinstance(given, tuple | list) and len(given) == 2 and callable(given[1])):
            raise CaptureError(
                f"columns: {name!r} is {given!r}",
                reason="a column is a pair of a dtype and a function of sample ids",
                remedy=example,
            )
        if name in filled:
            raise CaptureError(
                f"columns: {name!r} is what the pass itself computes and stores",
                reason="a store has one column of a name",
                remedy="choose another name, or leave the computed ones out with norms=False or "
                "losses=False",
            )


def column_values(name: str, column: ColumnOf, ids: Tensor) -> Any:
    """Return what a function says of samples, one value for each.

    Raises:
        CaptureError: If it does not return as many values.
    """
    values = column(ids)
    if (found := _count(values)) != len(ids):
        kind = type(values).__name__
        raise CaptureError(
            f"columns: the function of {name!r} returned a {kind}"
            f"{'' if found is None else f' of {found} values'} for {len(ids)} samples",
            reason="each sample has one value, in the order of the ids",
            remedy="return a tensor or an array of numbers, or a list of strings",
        )
    return values


def _count(values: Any) -> int | None:
    """Return how many values there are; None if they are none that have an order."""
    if isinstance(values, Tensor | np.ndarray):
        return values.shape[0] if values.ndim else None
    if isinstance(values, str | bytes | Mapping | set | frozenset):
        return None
    return len(values) if isinstance(values, Sized) and isinstance(values, Iterable) else None
