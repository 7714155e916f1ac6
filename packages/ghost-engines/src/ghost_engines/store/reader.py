"""Reads the rows of a store, and searches among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ghost_core.arguments import whole
from ghost_engines.progress import Progress
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.manifest import Manifest
from ghost_engines.store.neighbours import Neighbours, search
from ghost_engines.store.rows import StoredRows, Tail, concatenate
from ghost_engines.store.shards import (
    Shard,
    check_contents,
    read_ids,
    read_shard,
    shard_path,
)


class StoreReader:
    """What can be read of a store: its rows, their ids and losses, and neighbours of queries.

    Args:
        path: Folder of the store.
        manifest: What the rows are.
        shards: What is on disk.

    Attributes:
        path: Folder of the store.
        manifest: What the rows are.
        loss_dtype: Dtype of the losses; None if there are none.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]) -> None:
        self.path = path
        self.manifest = manifest
        full = sum(shard.n == manifest.unit for shard in shards)
        partial = shards[full].n if full < len(shards) else 0
        self._tail = Tail(full, partial, partial)
        self.loss_dtype: torch.dtype | None = shards[0].loss_dtype if shards else None

    def __len__(self) -> int:
        """Return the number of rows that were appended."""
        return self._tail.unit * self.manifest.unit + self._tail.length

    @property
    def committed(self) -> int:
        """Number of acknowledged rows."""
        return self._tail.unit * self.manifest.unit + self._tail.written

    @property
    def k_total(self) -> int:
        """Number of columns of a row."""
        return self.manifest.k_total

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self.manifest.torch_dtype

    @property
    def ids(self) -> Tensor:
        """Sample ids in order of the rows, int64 `[len]`; read anew each time.

        Raises:
            DamagedStoreError: If a file went missing.
        """
        full = (read_ids(self.path, unit) for unit in range(self._tail.unit))
        return torch.cat([*full, self._part(self._tail.unit).ids])

    @property
    def losses(self) -> Tensor | None:
        """Losses in order of the rows, `[len]`, if they were stored; read anew each time.

        Raises:
            DamagedStoreError: If a file went missing.
        """
        found = [part.loss for part in self._pieces(0, len(self)) if part.loss is not None]
        return torch.cat(found) if found else None

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows from ordinal `start` up to and without `stop`.

        Rows of one shard are mapped from the file. What is written to them stays in memory.

        Args:
            start: The first row.
            stop: The row after the last one; by default the end.

        Returns:
            `[stop - start, k_total]` in the store's dtype.

        Raises:
            StoreError: If there are no such rows.
            DamagedStoreError: If a file went missing.
        """
        start = whole("start", start, error=StoreError)
        stop = len(self) if stop is None else whole("stop", stop, error=StoreError)
        if not 0 <= start <= stop <= len(self):
            raise StoreError(f"there are no rows {start} to {stop}: the store has {len(self)}")
        return concatenate([*self._pieces(start, stop)] or [self._nothing()]).rows

    def blocks(self, size: int = 4096) -> Iterator[StoredRows]:
        """Yield all rows in order, mapped from the files.

        Args:
            size: The most rows to yield at once. Blocks end where a shard ends.

        Raises:
            StoreError: If the size is not positive.
            DamagedStoreError: If a file went missing.
        """
        size = whole("the rows of a block", size, least=1, error=StoreError)
        for piece in self._pieces(0, len(self)):
            for start in range(0, len(piece), size):
                yield piece[start : start + size]

    def search(
        self,
        queries: Tensor,
        k: int = 10,
        metric: str = "dot",
        *,
        block: int = 2048,
        progress: bool | None = None,
    ) -> Neighbours:
        """Find the rows with the highest scores for each query, exactly.

        Computes in float32, or in float64 if the rows or the queries are, on the queries' device.
        Equal scores come in order of the rows. Scores are rounded, so that equal rows need not
        have quite equal ones.

        Args:
            queries: `[Q, k_total]`, floating point.
            k: How many rows to find for each query. If the store has fewer, all are returned.
            metric: `dot`, or `cosine`, in which a row of zeros scores 0.
            block: Rows to compare at once.
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Returns:
            Scores, ids and ordinals, each `[Q, min(k, len)]`.

        Raises:
            UnknownNameError: If the metric does not exist.
            StoreError: If a shape does not fit, or a query or a score is not finite.
            DamagedStoreError: If a file went missing.
        """
        return search(self, queries, k=k, metric=metric, block=block, progress=progress)

    def verify(self, progress: bool | None = None) -> None:
        """Compare all that is on disk with its hashes.

        Args:
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Raises:
            DamagedStoreError: If a shard was altered. All such files are named.
        """
        problems = []
        with Progress(self.committed, "verify", progress) as bar:
            for unit in self._units_on_disk():
                try:
                    check_contents(self.path, unit)
                except DamagedStoreError as error:
                    problems.append(str(error))
                bar.advance(min(self.manifest.unit, self.committed - unit * self.manifest.unit))
        if problems:
            raise DamagedStoreError("\n".join(problems))

    @property
    def size_on_disk(self) -> int:
        """Bytes that the shards take.

        Raises:
            OSError: If a file went missing.
        """
        return sum(shard_path(self.path, unit).stat().st_size for unit in self._units_on_disk())

    def _units_on_disk(self) -> range:
        return range(self._tail.unit + (self._tail.written > 0))

    def _pieces(self, start: int, stop: int) -> Iterator[StoredRows]:
        """Yield the rows from `start` up to `stop`, shard by shard."""
        size, last = self.manifest.unit, self._tail.unit
        for unit in range(min(start // size, last), last + 1):
            first = unit * size
            if first < stop and len(
                piece := self._part(unit)[max(start - first, 0) : stop - first]
            ):
                yield piece

    def _part(self, unit: int) -> StoredRows:
        """Return the rows of a unit; of the last one, those that are only in memory too."""
        if unit == self._tail.unit and self._tail.parts:
            return concatenate(self._tail.parts)
        expected = min(self.manifest.unit, len(self) - unit * self.manifest.unit)
        if expected == 0:
            return self._nothing()
        rows = read_shard(self.path, unit)
        if len(rows) < expected:
            path = shard_path(self.path, unit)
            raise DamagedStoreError(f"{path} holds {len(rows)} rows, it had {expected}")
        return rows[:expected]  # a writer may have added to it since it was opened

    def _nothing(self) -> StoredRows:
        rows = torch.empty(0, self.k_total, dtype=self.dtype)
        loss = None if self.loss_dtype is None else torch.empty(0, dtype=self.loss_dtype)
        return StoredRows(torch.empty(0, dtype=torch.int64), rows, loss)
