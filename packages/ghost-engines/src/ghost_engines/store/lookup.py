"""Finds rows by the ids of their samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ghost_engines.store.errors import StoreError

_SHOWN = 20


@dataclass(frozen=True)
class IdIndex:
    """Ids of samples in order, and where their rows are.

    Attributes:
        ids: Ids, ascending, int64 `[len]`.
        ordinals: Ordinals of their rows, int64 `[len]`.
    """

    ids: Tensor
    ordinals: Tensor

    @classmethod
    def of(cls, stored: Tensor) -> Self:
        """Return the index of ids in order of the rows, int64 `[len]`."""
        return cls(*stored.sort(stable=True))


def ordinals_of(asked: Tensor, index: IdIndex) -> Tensor:
    """Return where samples are among those that are stored.

    Args:
        asked: Ids, int64 `[N]`.
        index: Those that are stored.

    Returns:
        Ordinals, int64 `[N]`.

    Raises:
        StoreError: If a sample is not stored, or more than once.
    """
    first = torch.searchsorted(index.ids, asked)
    times = torch.searchsorted(index.ids, asked, right=True) - first
    if (wrong := times != 1).any():
        missing, often = asked[times == 0], asked[times > 1]
        found = [
            f"{count} of sample{'s' if len(some) > 1 else ''} {_shown(some)} {are} stored"
            for some, count, are in ((missing, "no row", "is"), (often, "several rows", "are"))
            if len(some)
        ]
        raise StoreError(
            "; ".join(found),
            reason=f"{int(wrong.sum())} of {len(asked)} samples do not have one row",
            remedy="ask for others, or look at store.ids and read rows by their ordinals",
        )
    return index.ordinals[first]


def several_times(stored: Tensor) -> str:
    """Return which of some ids `[len]` are there more than once, as a text; empty if none is."""
    ids, counts = stored.unique(return_counts=True)
    return _shown(ids[counts > 1])


def _shown(ids: Tensor) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"{', '.join(map(str, ids[:_SHOWN].tolist()))}{more}"
