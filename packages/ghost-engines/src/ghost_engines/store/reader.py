"""Reads the rows of a store, and searches among them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ghost_core import SampleIds
from ghost_core.arguments import whole
from ghost_core.batch import as_ids
from ghost_core.tracking import Patterns
from ghost_engines.progress import Progress
from ghost_engines.store.beside import LOSS
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.index import INDEX
from ghost_engines.store.labels import Labels
from ghost_engines.store.listing import shard_path
from ghost_engines.store.lookup import ordinals_of, several_times
from ghost_engines.store.neighbours import Neighbours, best
from ghost_engines.store.pieces import Pieces
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.scan import Scan
from ghost_engines.store.scorer import By, Queries
from ghost_engines.store.shards import check_contents


class StoreReader(Pieces):
    """What can be read of a store: its rows, what is beside them, and neighbours of queries."""

    @property
    def ids(self) -> Tensor:
        """Sample ids in order of the rows, int64 `[len]`; read anew each time.

        Raises:
            DamagedStoreError: If a file went missing or was altered.
        """
        return self._ids()

    @property
    def losses(self) -> Tensor | None:
        """Losses in order of the rows, `[len]`, if they were stored; read anew each time.

        Raises:
            DamagedStoreError: If a file went missing or was altered.
        """
        return None if self.loss_dtype is None else self.columns[LOSS]

    @property
    def columns(self) -> Mapping[str, Any]:
        """What is stored beside the rows, by name; each is read anew when it is asked for.

        `columns["norm"]` is a tensor `[len]` of the dtype that the column was declared with, or
        `Labels` for a column of names.
        """
        dtypes = {name: column.torch_dtype for name, column in self.manifest.declared.items()}
        if self.loss_dtype is not None:
            dtypes[LOSS] = self.loss_dtype
        return _Columns(dtypes, self._column)

    @property
    def groups(self) -> Labels | None:
        """The column `group`, if there is one: the domain of each row, say.

        Raises:
            DamagedStoreError: If a file went missing or was altered.
        """
        return self.columns.get("group")

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
        """Return where the rows of samples are, int64 `[N]`.

        Of a store with many shards, whoever looks samples up first reads all ids, and leaves an
        index of them in the store's folder if it can be written. A writer reads them each time.

        Args:
            ids: Sample ids `[N]`, as they were given to batches.

        Raises:
            CaptureError: If they are no ids.
            StoreError: If a sample is not stored, or more than once.
            DamagedStoreError: If a file went missing or was altered.
        """
        return ordinals_of(as_ids(ids), self._index_of_ids())

    def rows_by_id(self, ids: SampleIds) -> Tensor:
        """Return the rows of samples, `[N, k_total]` in the store's dtype.

        Args:
            ids: Sample ids `[N]`, in any order.

        Raises:
            CaptureError: If they are no ids.
            StoreError: If a sample is not stored, or more than once.
            DamagedStoreError: If a file went missing or was altered.
        """
        asked = as_ids(ids)
        ordinals = ordinals_of(asked, self._index_of_ids())
        rows = torch.empty(len(ordinals), self.k_total, dtype=self.dtype, device="cpu")
        order = ordinals.argsort()
        ascending = ordinals[order]
        at = 0
        while at < len(order):
            slot = self._slot_at(int(ascending[at]))
            stop = int(torch.searchsorted(ascending, slot.first + slot.n))
            (piece,) = self._pieces(slot.first, slot.first + slot.n)
            here, there = order[at:stop], ascending[at:stop] - slot.first
            if not torch.equal(piece.ids[there], asked[here]):  # the shards count, not the index
                raise DamagedStoreError(
                    f"{self.path / INDEX} does not fit the shards: remove it, and look up again"
                )
            rows[here] = piece.rows[there]
            at = stop
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

        They are read and not mapped: a disk that fails is an error then, and no signal. Rows that
        are in memory already are not copied: do not write to any.

        Args:
            size: The most rows to yield at once. Blocks end where a shard ends.

        Raises:
            StoreError: If the size is not positive.
            DamagedStoreError: If a file went missing or was altered.
        """
        size = whole("the rows of a block", size, least=1, error=StoreError)
        if self._held is not None:
            yield from self._held.blocks(size)
            return
        room = torch.empty(0, self.k_total, dtype=self.dtype, device="cpu")
        for slot, part in self._parts(0, len(self)):
            if (piece := self._in_memory(slot, part)) is not None:
                for start in range(0, len(piece), size):
                    yield piece[start : start + size]
                continue
            with self._opened(slot) as file:
                self._check_once(slot, file)
                ids = file.read_tensor("ids")[: slot.size]
                if len(room) < min(size, len(ids)):
                    room = room.new_empty(min(size, len(ids)), self.k_total)
                for start in range(0, len(ids), size):
                    found = ids[start : start + size]
                    file.read_rows("g", start, room[: len(found)])
                    block = StoredRows(found, room[: len(found)])
                    if slot.kept is not None:
                        kept = slot.kept[(slot.kept >= start) & (slot.kept < start + size)] - start
                        block = block[kept]
                    if len(block):
                        yield block

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
        scan = Scan([self], [queries], by=by, parameters=parameters, device=device, block=block)
        return best(scan, k, largest=largest, progress=progress)

    def verify(self, progress: bool | None = None) -> None:
        """Compare all that is on disk with its hashes, and what several writers wrote by sample.

        Args:
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Raises:
            DamagedStoreError: If a shard was altered, or two parts have a sample that no later row
                is to replace. All such files are named.
        """
        problems = []
        with Progress(self.committed, "verify", progress) as bar:
            for slot in self._slots_on_disk():
                try:
                    with self._opened(slot) as file:
                        check_contents(file)
                except DamagedStoreError as error:
                    problems.append(str(error))
                bar.advance(slot.n)
        checked_alone = self._slots is None or self.manifest.duplicates == "replace"
        if not problems and not checked_alone and (twice := several_times(self.ids)):
            problems.append(f"{self.path} has samples {twice} in more than one of its parts")
        if problems:
            raise DamagedStoreError("\n".join(problems))

    def digest(self) -> str:
        """Return the sha256, in hexadecimal, of the hashes of all shards: what the rows are.

        Of a store that is read it stays what it was when the store was opened, whatever is
        appended since. Rows that later ones replace do not count where they are not read.

        Raises:
            StoreError: If there are rows that were not committed, or another writer went on with
                a store that this one has written and closed.
            DamagedStoreError: If a file went missing.
        """
        if self.committed < len(self):
            raise StoreError(
                f"the store at {self.path} has rows that are not committed",
                reason="what is derived from all rows is kept with a digest of those on disk",
                remedy="call commit() before",
            )
        digest = hashlib.sha256(self.manifest.fingerprint.encode())
        for slot in self._slots_on_disk():
            digest.update(self._hash(slot).encode())
            if slot.kept is not None:
                digest.update(b"kept" + slot.kept.numpy().tobytes())
        return digest.hexdigest()

    @property
    def size_on_disk(self) -> int:
        """Bytes that the shards take.

        Raises:
            OSError: If a file went missing.
        """
        return sum(
            shard_path(slot.part.root, slot.unit).stat().st_size for slot in self._slots_on_disk()
        )


class _Columns(Mapping[str, Any]):
    def __init__(
        self,
        dtypes: Mapping[str, torch.dtype],
        read: Callable[[str, torch.dtype], Tensor | Labels],
    ) -> None:
        self._dtypes, self._read = dtypes, read

    def __getitem__(self, name: str) -> Any:
        return self._read(name, self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)

    def __repr__(self) -> str:
        return f"<columns {', '.join(self) or 'none'}>"
