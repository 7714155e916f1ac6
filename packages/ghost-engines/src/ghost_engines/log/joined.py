"""Reads the logs of several processes as one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from heapq import merge
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from ghost_engines.log.log import ScoreLog
from ghost_engines.log.manifest import MANIFEST, has_log
from ghost_engines.log.steps import Directions
from ghost_engines.log.totals import totals
from ghost_engines.progress import Progress
from ghost_engines.store import DamagedStoreError, MissingLogError, StoreError, check_all
from ghost_engines.values import CreditedStep, ValueTable

logger = logging.getLogger(__name__)

RANK = "rank-"
"""What the folder of a process of a `Run` is called, before its rank."""

LOG = "log"
"""Where in the folder of a `Run`, or of a process of it, the log is."""


class JoinedLog:
    """The logs of the processes of one run, each of which wrote its own, read as one.

    A step has the samples of all of them; one that several processes had in a step is credited by
    each, as they all trained on it. Steps that only some have acknowledged yet are left out.

    Args:
        path: The folder that the logs are in.
        logs: The logs, in the order of their folders' names.

    Attributes:
        path: The folder that the logs are in.

    Raises:
        StoreError: If they are of other directions.
    """

    def __init__(self, path: Path, logs: Sequence[ScoreLog]) -> None:
        self.path = path
        self._logs = tuple(logs)
        named = {each.directions: each for each in logs if each.directions}
        if len(named) > 1:
            one, other, *_ = named
            raise StoreError(
                f"{named[one].path} has directions {', '.join(one)}, and {named[other].path} has "
                f"{', '.join(other)}: they are no logs of one run"
            )
        self._directions: Directions = next(iter(named), ())

    @classmethod
    def open(cls, path: str | Path) -> JoinedLog:
        """Open the logs in the folders inside of a folder, for reading.

        Args:
            path: A folder with a folder for each process, such as `runs/log/0` and `runs/log/1`,
                or that of a `Run` of several processes, which has `rank-0/log` and so on.

        Raises:
            StoreError: If there are no logs in it, one of a run's processes has none, or they are
                of other directions.
            DamagedStoreError: If a file is missing, cut off or of another log.
        """
        root = Path(path).absolute()
        folders = _folders(root)
        if not folders:
            raise MissingLogError(
                f"there is no score log at {root}, and none in the folders inside",
                remedy="make one with ScoreLog.create(path)",
            )
        logs = [ScoreLog.open(each) for each in folders]
        _check_all_there(root, folders, max(each.processes for each in logs))
        joined = cls(root, logs)
        joined._say_what_is_left_out()
        return joined

    def __repr__(self) -> str:
        """Say which steps it has."""
        steps = f"steps {self.first} to {self.last}" if len(self) else "no steps"
        return f"<{type(self).__name__}: {self.path}, {len(self._logs)} logs, {steps}>"

    def __len__(self) -> int:
        """Return the number of steps."""
        return min(map(len, self._logs)) if self.last is not None else 0

    @property
    def directions(self) -> Directions:
        """Names of the directions; empty as long as no step credited a sample."""
        return self._directions

    @property
    def first(self) -> int | None:
        """Number of the first step."""
        return None if self.last is None else self._logs[0].first

    @cached_property
    def last(self) -> int | None:
        """Number of the last step that all have."""
        ends = [each.last for each in self._logs]
        return None if None in ends else min(end for end in ends if end is not None)

    @property
    def size_on_disk(self) -> int:
        """Bytes that the shards take.

        Raises:
            OSError: If a file went missing.
        """
        return sum(each.size_on_disk for each in self._logs)

    def __iter__(self) -> Iterator[CreditedStep]:
        """Yield the steps in order, each with the samples of all processes.

        Raises:
            DamagedStoreError: If a file went missing, or a step is not in all logs.
        """
        steps = merge(*self._logs, key=attrgetter("step"))
        for number, parts in groupby(steps, attrgetter("step")):
            if self.last is None or number > self.last:
                return
            yield self._joined(number, list(parts))

    def totals(self, progress: bool | None = None) -> ValueTable:
        """Add up what each sample was credited with, over all steps; see `ScoreLog.totals`.

        Raises:
            DamagedStoreError: If a file went missing, or a step is not in all logs.
        """
        with Progress(len(self), "add up", progress, "step") as bar:
            return totals(self, self.directions, bar.advance)

    def verify(self) -> None:
        """Compare all that is on disk with its hashes.

        Raises:
            DamagedStoreError: If a shard was altered. All such files are named.
        """
        check_all(each.verify for each in self._logs)

    def _joined(self, number: int, parts: Sequence[CreditedStep]) -> CreditedStep:
        if len(parts) != len(self._logs):
            raise DamagedStoreError(
                f"step {number} is in {len(parts)} of the {len(self._logs)} logs at {self.path}",
                reason="each process logs every step, also those that credit none of its samples",
                remedy="keep the logs of one run, and of all its processes, in one folder",
            )
        none = torch.zeros(0, len(self.directions), dtype=torch.float64)
        return CreditedStep(
            step=number,
            ids=torch.cat([each.ids for each in parts]),
            values=torch.cat([none, *(each.values for each in parts if len(each.ids))]),
            directions=self.directions,
            altered=any(each.altered for each in parts),
        )

    def _say_what_is_left_out(self) -> None:
        ahead = [each for each in self._logs if each.last != self.last]
        if ahead:
            logger.warning(
                "the logs at %s: steps after %s are left out, which not all of the %d logs have",
                self.path,
                self.last or 0,
                len(self._logs),
            )


def open_log(path: str | Path) -> ScoreLog | JoinedLog:
    """Open a log, or the logs of several processes in the folders inside, for reading.

    Raises:
        StoreError: If there is none, or they are of other directions.
        DamagedStoreError: If a file is missing, cut off or of another log.
    """
    root = Path(path).absolute()
    inside = not has_log(root) and _folders(root)
    return JoinedLog.open(root) if inside else ScoreLog.open(root)


def _folders(root: Path) -> list[Path]:
    """Return the folders of the logs inside of a folder, sorted by name.

    Raises:
        StoreError: If one of the processes of a run has none.
    """
    if direct := sorted(each.parent for each in root.glob(f"*/{MANIFEST}")):
        return direct
    of_run = sorted(each.parent for each in root.glob(f"{RANK}*/{LOG}/{MANIFEST}"))
    ranks = {each.parent.name for each in of_run}
    known = {each.name for each in root.glob(f"{RANK}*")} | {
        f"{RANK}{r}" for r in range(len(ranks))
    }
    if of_run and ranks != known:
        raise _incomplete(f"{root} has no log of {', '.join(sorted(known - ranks))}")
    return of_run


def _check_all_there(root: Path, folders: Sequence[Path], processes: int) -> None:
    """Raise if there are fewer logs than processes that have trained, as these say."""
    missing = processes - len(folders)
    if missing <= 0:
        return
    there = {each.name if each.parent == root else each.parent.name for each in folders}
    for names in ([f"{RANK}{rank}" for rank in range(processes)], list(map(str, range(processes)))):
        if there < set(names):
            lacking = ", ".join(name for name in names if name not in there)
            raise _incomplete(f"{root} has no log of {lacking}")
    raise _incomplete(f"{root} lacks {missing} log{'s' * (missing > 1)} of {processes}")


def _incomplete(what: str) -> StoreError:
    return StoreError(
        what,
        reason="sums over the logs of the other processes would lack its samples",
        remedy="keep what each process of the run wrote in that folder",
    )
