"""Which samples a store has already."""

from __future__ import annotations

import torch
from torch import Tensor


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
