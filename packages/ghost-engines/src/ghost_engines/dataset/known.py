"""Which samples a store has already, and which a pass has met."""

from __future__ import annotations

import torch
from torch import Tensor

from ghost_core import CaptureError
from ghost_engines.store import SeenIds

_SHOWN = 20


class KnownIds:
    """Sample ids, in order, so that each is found at once.

    Args:
        ids: Int64 `[n]`.
    """

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids.sort().values

    def new(self, ids: Tensor) -> Tensor:
        """Return which ids are not known, bool `[n]`."""
        if not len(self._ids):
            return torch.ones(len(ids), dtype=torch.bool)
        at = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        return self._ids[at] != ids


class MetIds:
    """Sample ids that one pass over data has met, each of which may come once.

    Without it a sample with the id of another would be taken for one that is stored, once the
    other is.
    """

    def __init__(self) -> None:
        self._seen = SeenIds(torch.empty(0, dtype=torch.int64))

    def add(self, ids: Tensor) -> None:
        """Add ids, int64 `[n]`.

        Raises:
            CaptureError: If one is there twice, or was added before.
        """
        own, counts = ids.unique(return_counts=True)
        again = torch.cat([own[counts > 1], self._seen.known(own)]).unique().tolist()
        if again:
            more = f" and {len(again) - _SHOWN} more" if len(again) > _SHOWN else ""
            raise CaptureError(
                f"data: sample ids {', '.join(map(str, again[:_SHOWN]))}{more} come more than once",
                reason="a row is found by the id of its sample, and a store has one row for each",
                remedy="give every sample an id of its own, and each of them once",
            )
        self._seen.add(own)
