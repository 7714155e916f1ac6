"""Remembers which sample ids a store has, in eight bytes each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Run = npt.NDArray[np.int64]


class SeenIds:
    """A set of ids, as sorted runs of which each is at least twice as long as the next."""

    def __init__(self, ids: Tensor) -> None:
        self._runs: list[Run] = []
        self.add(ids)

    def __len__(self) -> int:
        """Return how many ids were added, one that was added twice as two."""
        return sum(map(len, self._runs))

    def known(self, ids: Tensor) -> Tensor:
        """Return those of some ids `[N]` that were added before."""
        if not len(ids):
            return ids
        asked = ids.numpy()
        least, most = asked.min(), asked.max()
        known = [
            run[run.searchsorted(asked).clip(max=len(run) - 1)] == asked
            for run in self._runs
            if run[0] <= most and least <= run[-1]  # ids are given in order, as a rule
        ]
        return ids[torch.from_numpy(np.any(known, axis=0))] if known else ids[:0]

    def add(self, ids: Tensor) -> None:
        """Add ids `[N]`."""
        if not len(ids):
            return
        run = _in_order(ids).copy()  # whoever appended may write to its memory
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = _merged(self._runs.pop(), run)
        self._runs.append(run)


def twice(ids: Tensor) -> Tensor:
    """Return those of some ids `[N]` that stand more than once among them."""
    run = _in_order(ids)
    return torch.from_numpy(run[1:][run[1:] == run[:-1]])


def _in_order(ids: Tensor) -> Run:
    """Return ids in ascending order, in which they are given as a rule."""
    run: Run = ids.numpy()
    return run if (run[1:] >= run[:-1]).all() else np.sort(run)


def _merged(one: Run, other: Run) -> Run:
    both = np.concatenate([one, other])
    if one[-1] > other[0]:
        both.sort(kind="stable")  # which finds the two runs, and merges them
    return both
