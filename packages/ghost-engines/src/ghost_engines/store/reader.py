"""Reads the rows of a store, and searches among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ghost_core import SampleIds
from ghost_core.arguments import whole
from ghost_core.batch import as_ids
from ghost_core.tracking import Patterns
from ghost_engines.progress import Progress
from ghost_engines.store.comparison import By, Comparison, Queries
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.listing import shard_path
from ghost_engines.store.lookup import ordinals_of
from ghost_engines.store.manifest import MANIFEST, Manifest
from ghost_engines.store.neighbours import Neighbours, best
from ghost_engines.store.place import Place
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.shards import (
    Shard,
    check_contents,
    inspect,
    open_shard,
    read_checked,
    rows_of,
)
from ghost_engines.store.tail import Tail
from ghost_engines.store.tensor_files import TensorFile


class StoreReader:
    """What can be read of a store: its rows, their ids and losses, and neighbours of queries.

    Args:
        path: Folder of the store.
        manifest: What the rows are.
        shards: What is on disk.
        check: Whether to compare each shard with its hash when it is read for the first time.

    Attributes:
        path: Folder of the store.
        manifest: What the rows are.
        loss_dtype: Dtype of the losses; None if there are none.
    """

    def __init__(
        self, path: Path, manifest: Manifest, shards: list[Shard], *, check: bool = True
    ) -> None:
        self._place = Place(path / MANIFEST)
        self._check = check
        self._checked: dict[int, tuple[int, int, int]] = {}
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
            DamagedStoreError: If a file went missing or was altered.
        """
        return self._column("ids", torch.int64)

    @property
    def losses(self) -> Tensor | None:
        """Losses in order of the rows, `[len]`, if they were stored; read anew each time.

        Raises:
            DamagedStoreError: If a file went missing or was altered.
        """
        return None if self.loss_dtype is None else self._column("loss", self.loss_dtype)

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
        pieces = self._pieces(start, stop)
        first = next(pieces, None)
        if first is not None and len(first) == stop - start:
            return first.rows
        # A piece is copied and let go: a process can have some 65,000 maps, all in all.
        rows = torch.empty(stop - start, self.k_total, dtype=self.dtype, device="cpu")
        at = 0
        while first is not None:
            rows[at : at + len(first)] = first.rows
            at += len(first)
            first = next(pieces, None)
        return rows

    def ordinals(self, ids: SampleIds) -> Tensor:
        """Return where the rows of samples are, int64 `[N]`. Reads all ids: keep what it returns.

        Args:
            ids: Sample ids `[N]`, as they were given to batches.

        Raises:
            CaptureError: If they are no ids.
            StoreError: If a sample is not stored, or more than once.
            DamagedStoreError: If a file went missing or was altered.
        """
        return ordinals_of(as_ids(ids), self.ids)

    def rows_by_id(self, ids: SampleIds) -> Tensor:
        """Return the rows of samples, `[N, k_total]` in the store's dtype.

        Args:
            ids: Sample ids `[N]`, in any order.

        Raises:
            CaptureError: If they are no ids.
            StoreError: If a sample is not stored, or more than once.
            DamagedStoreError: If a file went missing or was altered.
        """
        ordinals = self.ordinals(ids)
        rows = torch.empty(len(ordinals), self.k_total, dtype=self.dtype, device="cpu")
        size = self.manifest.unit
        order = ordinals.argsort()
        units, counts = (ordinals[order] // size).unique_consecutive(return_counts=True)
        for unit, at in zip(units.tolist(), order.split(counts.tolist()), strict=True):
            first = unit * size
            (piece,) = self._pieces(first, min(first + size, len(self)))
            rows[at] = piece.rows[ordinals[at] - first]
        return rows

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

    def scan(self, size: int = 4096) -> Iterator[StoredRows]:
        """Yield all rows in order, without their losses, in memory that the next ones take over.

        They are read and not mapped: a disk that fails is an error then, and no signal.

        Args:
            size: The most rows to yield at once. Blocks end where a shard ends.

        Raises:
            StoreError: If the size is not positive.
            DamagedStoreError: If a file went missing or was altered.
        """
        size = whole("the rows of a block", size, least=1, error=StoreError)
        room = torch.empty(0, self.k_total, dtype=self.dtype, device="cpu")
        for unit, part in self._parts(0, len(self)):
            if (piece := self._in_memory(unit, part)) is not None:
                for start in range(0, len(piece), size):
                    yield piece[start : start + size]
                continue
            with self._opened(unit) as file:
                self._check_once(unit, file)
                ids = file.read_tensor("ids")[: part.stop]
                if len(room) < min(size, len(ids)):
                    room = torch.empty(
                        min(size, len(ids)), self.k_total, dtype=self.dtype, device="cpu"
                    )
                for start in range(0, len(ids), size):
                    found = ids[start : start + size]
                    file.read_rows("g", start, room[: len(found)])
                    yield StoredRows(found, room[: len(found)], None)

    def search(
        self,
        queries: Queries,
        k: int = 10,
        by: By = "dot",
        *,
        largest: bool = True,
        parameters: Patterns | None = None,
        device: torch.device | str | None = None,
        block: int = 4096,
        progress: bool | None = None,
    ) -> Neighbours:
        """Find the best rows for each query among all rows.

        Computes in float32, or in float64 if the rows or the queries are. Equal scores come in
        order of the rows. Scores are rounded, so that equal rows need not have quite equal ones.

        Args:
            queries: `[Q, k_total]`, floating point; or what an engine collected, which must be one
                like that of the store.
            k: How many rows to find for each query. If the store has fewer, all are returned.
            by: `dot`; `cosine`, in which a row of zeros scores 0; or a `Whitening` of this store.
            largest: Whether the largest scores are the best, or the smallest.
            parameters: Globs over names of modules and parameters: whose columns to compare, as if
                rows had no others. By default all.
            device: Where to compute; by default where the queries are.
            block: Rows to compare at once.
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Returns:
            Scores, ids and ordinals, each `[Q, min(k, len)]`, best first.

        Raises:
            UnknownNameError: If the metric does not exist, or a glob matches nothing.
            StoreError: If a shape does not fit, a query or a score is not finite, the queries are
                of another engine, or the whitening is of other rows.
            DamagedStoreError: If a file went missing.
        """
        comparison = Comparison(
            [self], [queries], by=by, parameters=parameters, device=device, block=block
        )
        return best(comparison, k, largest=largest, progress=progress)

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
                    with self._opened(unit) as file:
                        check_contents(file)
                except DamagedStoreError as error:
                    problems.append(str(error))
                bar.advance(min(self.manifest.unit, self.committed - unit * self.manifest.unit))
        if problems:
            raise DamagedStoreError("\n".join(problems))

    def digest(self) -> str:
        """Return the sha256, in hexadecimal, of the hashes of all shards: what the rows are.

        Raises:
            StoreError: If there are rows that were not committed.
            DamagedStoreError: If a file went missing.
        """
        if self.committed < len(self):
            raise StoreError(
                f"the store at {self.path} has rows that are not committed",
                reason="what is derived from all rows is kept with a digest of those on disk",
                remedy="call commit() before",
            )
        digest = hashlib.sha256(self.manifest.fingerprint.encode())
        for unit in self._units_on_disk():
            with self._opened(unit) as file:
                digest.update(str(file.metadata["sha256"]).encode())
        return digest.hexdigest()

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
        for unit, part in self._parts(start, stop):
            if (piece := self._in_memory(unit, part)) is not None:
                yield piece.copy()
                continue
            with self._opened(unit) as file:
                self._check_once(unit, file)
                piece = rows_of(file)[part]
            yield piece

    def _column(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return one number of each row."""
        column = torch.empty(len(self), dtype=dtype, device="cpu")
        for unit, part in self._parts(0, len(self)):
            if (piece := self._in_memory(unit, part)) is not None:
                found = piece.tensors()[name]
            else:
                with self._opened(unit) as file:
                    whole = read_checked(file, name) if self._check else file.read_tensor(name)
                found = whole[part]
            first = unit * self.manifest.unit
            column[first + part.start : first + part.stop] = found
        return column

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Yield the units with rows from `start` up to `stop`, and which of their rows."""
        size = self.manifest.unit
        while start < stop:
            unit, first = divmod(start, size)
            end = min(stop - unit * size, size)
            yield unit, slice(first, end)
            start = unit * size + end

    def _in_memory(self, unit: int, part: slice) -> StoredRows | None:
        """Return some rows of a unit as views, if they are in memory; they may be of several."""
        if self._tail.memory is None or unit < self._tail.unit:
            return None
        first = (unit - self._tail.unit) * self.manifest.unit
        return self._tail.rows[first + part.start : first + part.stop]

    @contextmanager
    def _opened(self, unit: int) -> Iterator[TensorFile]:
        """Open a shard that has the rows that it had when the store was opened, or more."""
        expected = min(self.manifest.unit, len(self) - unit * self.manifest.unit)
        with open_shard(self.path, self.manifest, unit) as file:
            self._place.check()  # the shard was there before: it is of the store that is there now
            if (n := inspect(file, self.manifest, unit).n) < expected:
                raise DamagedStoreError(f"{file.path} holds {n} rows, it had {expected}")
            yield file

    def _check_once(self, unit: int, file: TensorFile) -> None:
        """Compare a shard with its hash if it was not, or was replaced since."""
        if self._check and self._checked.get(unit) != file.version:
            check_contents(file)
            self._checked[unit] = file.version
