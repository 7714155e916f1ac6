"""Remembers which sample ids a store has, in eight bytes each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Run = npt.NDArray[np.int64]

_MOST_WAITING = 64
"""Of how many batches a run is made at once."""


class SeenIds:
    """A set of ids, as sorted runs of which each is at least twice as long as the next.

    Ids that come in order wait to be made a run of, until there are more or somebody asks.
    """

    def __init__(self, ids: Tensor) -> None:
        self._runs: list[Run] = []
        self._waiting: list[Run] = []
        self._greatest = -(2**63)
        self.add(ids)

    def __len__(self) -> int:
        """Return how many ids were added, one that was added twice as two."""
        # Counted anew each time: whoever was interrupted in here knows it by their number.
        return sum(map(len, self._runs)) + sum(map(len, self._waiting))

    def extend(self, ids: Tensor) -> bool:
        """Add ids `[N]` if each is greater than all before it, and return whether it is.

        None of them was added before, then, and none stands twice among them.
        """
        run: Run = ids.numpy()
        if not len(run) or not run[0] > self._greatest or not (run[1:] > run[:-1]).all():
            return False
        self._waiting.append(run.copy())  # whoever appended may write to its memory
        self._greatest = run[-1]
        if len(self._waiting) == _MOST_WAITING:
            self._settle()
        return True

    def known(self, ids: Tensor) -> Tensor:
        """Return those of some ids `[N]` that were added before."""
        if not len(ids):
            return ids
        self._settle()
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
        self._settle()
        run = _in_order(ids).copy()
        self._greatest = max(self._greatest, run[-1])
        self._add_run(run)

    def _settle(self) -> None:
        if self._waiting:
            self._add_run(np.concatenate(self._waiting))
            self._waiting = []

    def _add_run(self, run: Run) -> None:
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
