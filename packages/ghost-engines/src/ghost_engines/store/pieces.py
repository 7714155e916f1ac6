"""The rows of a store, shard by shard: read from files, or as a writer has them in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from ghost_engines.store.beside import LOSS
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.held_rows import HeldRows
from ghost_engines.store.index import WORTH_KEEPING, kept_index
from ghost_engines.store.labels import Labels, Names
from ghost_engines.store.lookup import IdIndex
from ghost_engines.store.manifest import MANIFEST, Manifest
from ghost_engines.store.parts import Part
from ghost_engines.store.place import Place
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.shards import (
    Shard,
    check_contents,
    digest_of,
    inspect,
    one_loss_dtype,
    open_shard,
    read_column,
    rows_of,
)
from ghost_engines.store.slots import Slot, interleaved, latest
from ghost_engines.store.tail import Tail
from ghost_engines.store.tensor_files import TensorFile


class Pieces:
    """What a store's shards hold, in order.

    Args:
        path: Folder of the store.
        manifest: What the rows are.
        parts: What is on disk, for each part that is read.
        check: Whether to compare each shard with its hash when it is read for the first time.

    Attributes:
        path: Folder of the store.
        manifest: What the rows are.
        loss_dtype: Dtype of the losses; None if there are none.
        writers: Of how many writers the rows are.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        parts: Sequence[tuple[Part, Sequence[Shard]]],
        *,
        check: bool = True,
    ) -> None:
        self._place = Place(path / MANIFEST)
        self._check = check
        self._held: HeldRows | None = None
        self._checked: dict[tuple[str, int], tuple[int, int, int]] = {}
        self.path = path
        self.manifest = manifest
        self.writers = len(parts)
        self._made_of = digest_of(manifest.fingerprint, parts)
        # Writers may replace these by fuller ones, whose hashes say nothing of the rows so far.
        self._partial = {
            (part.name, unit): shard
            for part, shards in parts
            for unit, shard in enumerate(shards)
            if shard.n < manifest.unit
        }
        self._keeps_index = sum(len(shards) for _, shards in parts) >= WORTH_KEEPING
        self._index: IdIndex | None = None
        self._part, shards = parts[0]
        full = sum(shard.n == manifest.unit for shard in shards)
        partial = shards[full].n if full < len(shards) else 0
        self._tail = Tail(full, partial, partial)
        self._slots: list[Slot] | None = interleaved(parts) if len(parts) > 1 else None
        declared = manifest.declared.get(LOSS)
        self.loss_dtype = declared.torch_dtype if declared else one_loss_dtype(path, parts)

    def __len__(self) -> int:
        """Return the number of rows that were appended."""
        if self._slots is not None:
            return self._slots[-1].first + self._slots[-1].n if self._slots else 0
        return self._tail.unit * self.manifest.unit + self._tail.length

    @property
    def committed(self) -> int:
        """Number of acknowledged rows."""
        if self._slots is not None:
            return len(self)
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
    def held_rows(self) -> HeldRows | None:
        """All rows, if they are held in memory."""
        return self._held

    def _leave_out_replaced(self) -> None:
        """Read the rows alone that no later one of the same sample replaces."""
        self._slots = latest([slot for slot, _ in self._parts(0, len(self))], self._ids())

    def _index_of_ids(self) -> IdIndex:
        """Return where the rows of samples are, for many shards as of a file that is kept."""
        if not self._keeps_index:
            return IdIndex.of(self._ids())
        if self._index is None:
            self._index = kept_index(self.path, self._made_of, self._ids)
        return self._index

    def _ids(self) -> Tensor:
        ids = self._column("ids", torch.int64)
        assert isinstance(ids, Tensor)
        return ids

    def _slots_on_disk(self) -> Iterator[Slot]:
        if self._slots is not None:
            yield from self._slots
            return
        for slot, part in self._parts(0, self.committed):
            yield replace(slot, size=part.stop)

    def _pieces(self, start: int, stop: int) -> Iterator[StoredRows]:
        """Yield the rows from `start` up to `stop`, shard by shard."""
        for slot, part in self._parts(start, stop):
            if (piece := self._in_memory(slot, part)) is not None:
                yield piece.copy()
                continue
            with self._opened(slot) as file:
                self._check_once(slot, file)
                piece = rows_of(file, self.manifest)[slot.rows(part)]
            yield piece

    def _column(self, name: str, dtype: torch.dtype) -> Tensor | Labels:
        """Return one number or name of each row; numbers of names are int32."""
        names = Names()
        named = name in self.manifest.declared and self.manifest.declared[name].is_category
        column = torch.empty(len(self), dtype=dtype, device="cpu")
        for slot, part in self._parts(0, len(self)):
            found = self._column_of(slot, part, name)
            numbers = found.numbered(names) if isinstance(found, Labels) else found
            column[slot.first + part.start : slot.first + part.stop] = numbers
        return Labels(column, tuple(names)) if named else column

    def _column_of(self, slot: Slot, part: slice, name: str) -> Tensor | Labels:
        if (piece := self._in_memory(slot, part)) is not None:
            return piece.columns[name] if name in piece.columns else piece.tensors()[name]
        with self._opened(slot) as file:
            found = read_column(file, name, check=self._check)
        rows = slot.rows(part)
        return Labels(found.codes[rows], found.names) if isinstance(found, Labels) else found[rows]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Slot, slice]]:
        """Yield the shards with rows from `start` up to `stop`, and which of their rows."""
        while start < stop:
            slot = self._slot_at(start)
            end = min(stop - slot.first, slot.n)
            yield slot, slice(start - slot.first, end)
            start = slot.first + end

    def _slot_at(self, ordinal: int) -> Slot:
        """Return the shard that has a row."""
        if self._slots is not None:
            return self._slots[bisect_right(self._slots, ordinal, key=attrgetter("first")) - 1]
        size = self.manifest.unit
        unit = ordinal // size
        return Slot(self._part, unit, unit * size, min(size, len(self) - unit * size))

    def _in_memory(self, slot: Slot, part: slice) -> StoredRows | None:
        """Return some rows of a unit as views, if they are in memory."""
        if self._tail.memory is None or slot.unit < self._tail.unit:
            return None
        first = (slot.unit - self._tail.unit) * self.manifest.unit
        return self._tail.rows[first + part.start : first + part.stop]

    @contextmanager
    def _opened(self, slot: Slot) -> Iterator[TensorFile]:
        """Open a shard that has the rows that it had when the store was opened, or more."""
        with open_shard(slot.part, self.manifest, slot.unit) as file:
            self._place.check()  # the shard was there before: it is of the store that is there now
            if (n := inspect(file, self.manifest).n) < slot.size:
                raise DamagedStoreError(f"{file.path} holds {n} rows, it had {slot.size}")
            yield file

    def _hash(self, slot: Slot) -> str:
        """Return the hash of a shard when it had the rows that this store reads of it."""
        with self._opened(slot) as file:
            shard = inspect(file, self.manifest)
        if shard.n > slot.size:
            known = self._partial.get((slot.part.name, slot.unit))
            if known is None or known.n != slot.size:
                raise StoreError(
                    f"{file.path} had {slot.size} rows and has {shard.n} now",
                    reason="another writer went on with the store since this one closed it",
                    remedy="open the store anew: GradientStore.open(path)",
                )
            shard = known
        return shard.hash

    def _check_once(self, slot: Slot, file: TensorFile) -> None:
        """Compare a shard with its hash if it was not, or was replaced since."""
        shard = slot.part.name, slot.unit
        if self._check and self._checked.get(shard) != file.version:
            check_contents(file)
            self._checked[shard] = file.version
