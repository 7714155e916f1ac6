"""Reads the steps of a log, and adds them up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ghost_engines.log.manifest import Manifest
from ghost_engines.log.shards import Shard, directions_of, read_shard
from ghost_engines.log.steps import Directions, Tail
from ghost_engines.log.totals import totals
from ghost_engines.progress import Progress
from ghost_engines.store import DamagedStoreError, check_all, shard_path
from ghost_engines.values import CreditedStep, ValueTable

Contents = tuple[tuple[Shard, ...], Tail]
"""The shards that are full, and what comes after them. A writer replaces both by one assignment: an
interrupt finds them as they were before a step, or after it."""


class LogReader:
    """What can be read of a log: its steps in order, and their sums by sample.

    Args:
        path: Folder of the log.
        manifest: What is the same for all shards.
        shards: What is on disk.

    Attributes:
        path: Folder of the log.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]) -> None:
        self.path = path
        self._manifest = manifest
        self._contents: Contents = tuple(shards), Tail(len(shards))

    def __repr__(self) -> str:
        """Say which steps it has."""
        steps = f"steps {self.first} to {self.last}" if len(self) else "no steps"
        return f"<{type(self).__name__}: {self.path}, {steps}>"

    def __len__(self) -> int:
        """Return the number of steps."""
        shards, tail = self._contents
        return sum(shard.steps for shard in shards) + len(tail.steps)

    @property
    def directions(self) -> Directions:
        """Names of the directions; empty as long as no step credited a sample."""
        shards, tail = self._contents
        return directions_of(shards) or tail.directions

    @property
    def processes(self) -> int:
        """Number of processes that trained together, as far as it is known: 1 where it is not."""
        return self._manifest.processes or 1

    @property
    def first(self) -> int | None:
        """Number of the first step."""
        shards, tail = self._contents
        if shards:
            return shards[0].first
        return tail.steps[0].step if tail.steps else None

    @property
    def last(self) -> int | None:
        """Number of the last step that was appended."""
        _, tail = self._contents
        return tail.steps[-1].step if tail.steps else self.committed

    @property
    def committed(self) -> int | None:
        """Number of the last step that is on disk."""
        shards, tail = self._contents
        if tail.written:
            return tail.steps[tail.written - 1].step
        return shards[-1].last if shards else None

    @property
    def size_on_disk(self) -> int:
        """Bytes that the shards take.

        Raises:
            OSError: If a file went missing.
        """
        return sum(shard_path(self.path, unit).stat().st_size for unit in self._units())

    def __iter__(self) -> Iterator[CreditedStep]:
        """Yield the steps in order; what is on disk is mapped from it, a shard at a time.

        Raises:
            DamagedStoreError: If a file went missing.
        """
        shards, tail = self._contents
        directions = self.directions
        for unit, shard in enumerate(shards):
            found = read_shard(self.path, unit)
            if len(found) < shard.steps:
                path = shard_path(self.path, unit)
                raise DamagedStoreError(f"{path} holds {len(found)} steps, it had {shard.steps}")
            # A writer may have added to it since it was opened.
            yield from found.first(shard.steps).split(directions)
        yield from tail.steps

    def totals(self, progress: bool | None = None) -> ValueTable:
        """Add up what each sample was credited with, over all steps.

        Memory is taken for each sample once, and for each step a number for each direction.

        Args:
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Raises:
            DamagedStoreError: If a file went missing.
        """
        with Progress(len(self), "add up", progress, "step") as bar:
            return totals(self, self.directions, bar.advance)

    def verify(self) -> None:
        """Compare all that is on disk with its hashes.

        Raises:
            DamagedStoreError: If a shard was altered. All such files are named.
        """
        check_all(partial(read_shard, self.path, unit, checked=True) for unit in self._units())

    def _units(self) -> range:
        shards, tail = self._contents
        return range(len(shards) + (tail.written > 0))
