"""Remembers which sample ids a store has, in eight bytes each."""

from __future__ import annotations

import torch
from torch import Tensor


class SeenIds:
    """A set of ids, as sorted runs of which each is at least twice as long as the next."""

    def __init__(self, ids: Tensor) -> None:
        self._runs = [ids.sort().values]

    def __len__(self) -> int:
        """Return how many ids were added, one that was added twice as two."""
        return sum(map(len, self._runs))

    def known(self, ids: Tensor) -> Tensor:
        """Return those of some ids `[N]` that were added before."""
        known = torch.zeros(ids.shape, dtype=torch.bool)
        for run in self._runs:
            if len(run):
                at = torch.searchsorted(run, ids).clamp(max=len(run) - 1)
                known |= run[at] == ids
        return ids[known]

    def add(self, ids: Tensor) -> None:
        """Add ids `[N]`."""
        self._runs.append(ids.sort().values)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = torch.cat([self._runs[-1], last]).sort().values
