"""The rows of a store, shard by shard: read from files, or as a writer has them in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ghost_engines.store.errors import DamagedStoreError
from ghost_engines.store.labels import Labels, Names
from ghost_engines.store.manifest import MANIFEST, Manifest
from ghost_engines.store.place import Place
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.shards import (
    Shard,
    check_contents,
    inspect,
    open_shard,
    read_column,
    rows_of,
)
from ghost_engines.store.tail import Tail
from ghost_engines.store.tensor_files import TensorFile


class Pieces:
    """What a store's shards hold, in order.

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
                piece = rows_of(file, self.manifest)[part]
            yield piece

    def _column(self, name: str, dtype: torch.dtype) -> Tensor | Labels:
        """Return one number or name of each row; numbers of names are int32."""
        names = Names()
        named = name in self.manifest.declared and self.manifest.declared[name].is_category
        column = torch.empty(len(self), dtype=dtype, device="cpu")
        for unit, part in self._parts(0, len(self)):
            found = self._column_of(unit, part, name)
            first = unit * self.manifest.unit
            numbers = found.numbered(names) if isinstance(found, Labels) else found
            column[first + part.start : first + part.stop] = numbers
        return Labels(column, tuple(names)) if named else column

    def _column_of(self, unit: int, part: slice, name: str) -> Tensor | Labels:
        if (piece := self._in_memory(unit, part)) is not None:
            return piece.columns[name] if name in piece.columns else piece.tensors()[name]
        with self._opened(unit) as file:
            found = read_column(file, name, check=self._check)
        return Labels(found.codes[part], found.names) if isinstance(found, Labels) else found[part]

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
