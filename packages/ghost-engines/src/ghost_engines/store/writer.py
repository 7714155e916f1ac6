"""What a writer of a store does: it never loses or duplicates a row that it has acknowledged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ghost_engines.files import closed_after, remove
from ghost_engines.store.beside import ColumnValues
from ghost_engines.store.committed import write_committed
from ghost_engines.store.errors import StoreError
from ghost_engines.store.labels import Names
from ghost_engines.store.lock import WriterLock
from ghost_engines.store.manifest import MANIFEST, Manifest
from ghost_engines.store.origin import check_origin, check_verified
from ghost_engines.store.parts import Part
from ghost_engines.store.reader import StoreReader
from ghost_engines.store.rows import RowBatch, check_finite, checked, with_tables
from ghost_engines.store.seen import SeenIds, twice
from ghost_engines.store.shards import Shard, check_contents, rows_of, write_shard

logger = logging.getLogger(__name__)


class StoreWriter(StoreReader):
    """What can be done with a store that is open for writing."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        parts: Sequence[tuple[Part, Sequence[Shard]]],
        lock: WriterLock | None,
        *,
        recorded: int = 0,
        check: bool = True,
    ) -> None:
        super().__init__(path, manifest, parts, check=check)
        self._lock = lock
        self._made = False
        self._keeps_index = self._keeps_index and lock is None  # its rows change
        self._recorded = recorded
        self._origin: object = None
        self._said: set[str] = set()
        self._seen: SeenIds | None = None
        self._names = {
            name: Names() for name, column in manifest.declared.items() if column.is_category
        }
        if lock is not None and self._tail.length:
            # A writer replaces the last shard, with a new hash: what is in it must fit the old one.
            with self._opened(self._slot_at(len(self) - 1)) as file:
                check_contents(file)
                rows = rows_of(file, manifest)[: self._tail.length].copy()
            self._tail = replace(self._tail, memory=with_tables(rows, self._names))

    def __repr__(self) -> str:
        """Say where it is, what is in it, and whether it is open for writing."""
        root = self._part.root if self.writers == 1 else self.path
        facts = [str(root), f"{len(self)} rows of {self.k_total} {self.manifest.dtype}"]
        if waiting := len(self) - self.committed:
            facts.append(f"{waiting} not committed")
        if self._lock is not None:
            facts.append("open for writing")
        if self._held is not None:
            facts.append("held in memory")
        return f"<{type(self).__name__}: {', '.join(facts)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exception: BaseException | None, traceback: object) -> None:
        lost = f"the last rows could not be written to {self.path}"
        closed_after(self.close, exception, lost)

    def close(self) -> None:
        """Commit and let the next writer in; the store can still be read.

        Raises:
            OSError: If writing fails; rows that were not acknowledged are lost then.
        """
        if self._lock is None:
            return
        try:
            if self._lock.held:
                self._lock.check_place()
                self._write(partial=True)
                self._record()
        finally:
            # In this order, whatever is repeated after an interrupt does nothing twice.
            self._tail = self._tail.written_out()
            self._lock.release()
            self._lock = None

    def withdraw(self) -> None:
        """Close a store that was made in vain.

        One that `create` has made, and that was never given a row since, is a store no more: what
        comes next may make another one there, of other data or options. Its folder stays, with the
        file that writers lock. Any other store is closed as by `close`.

        Raises:
            OSError: If writing fails, as of `close`, or removing does.
        """
        if self._made and not len(self) and self._lock is not None and self._lock.held:
            self._lock.check_place()
            remove(self.path / MANIFEST)
        self.close()

    # Writing

    def append(
        self,
        batch: RowBatch,
        loss: Tensor | None = None,
        *,
        columns: Mapping[str, ColumnValues] | None = None,
    ) -> None:
        """Add rows, and write every unit that they fill.

        Rows of a model in which dropout was at work are taken; a warning says so, once for a
        store.

        Args:
            batch: Has `ids`, int64 `[N]`, and `rows`, `[N, k_total]` in the store's dtype, on any
                device. Both are copied. If it has a `manifest`, as what engines collect, that must
                be the one of the engine that the store was made with; if it has `verified`, it
                must be as the store says.
            loss: The samples' losses `[N]`, floating point; for all batches of a store or none.
            columns: What else is stored beside the rows, by name: all columns that were declared
                when the store was made, as tensors or arrays `[N]` of their dtypes, or N strings.

        Raises:
            StoreError: If the store is not open for writing, a shape or dtype does not fit, a
                column is missing or unknown, a row is not finite, a sample is stored already and
                the store does not say that its row is to be replaced, or rows are of another engine
                or not verified. The store is as it was before.
            DamagedStoreError: If a file went missing or was altered since the store was opened.
            OSError: If writing fails. The rows are taken nevertheless: do not append them again.
                Call `commit`, which tries again; no other batch is accepted before it succeeds.

        After an interrupt the same call can be repeated: if the rows were taken, it is refused as
        it is after a failed write.
        """
        self._check_writable()
        if not self._tail.settled:
            raise StoreError(
                "an earlier write failed or was interrupted, whose rows were taken: call commit() "
                "to try again; do not append them again"
            )
        rows = checked(batch, loss, {} if columns is None else columns, self.manifest, self._names)
        if (made := getattr(batch, "manifest", None)) is not self._origin:
            check_origin(batch, self.manifest)
            self._origin = made  # all batches of an engine have the same
        check_verified(batch, self.manifest)
        loss_dtype = None if rows.loss is None else rows.loss.dtype
        if len(self) and loss_dtype != self.loss_dtype:
            raise StoreError(
                f"the rows so far have {_losses(self.loss_dtype)}, these {_losses(loss_dtype)}"
            )
        if not len(rows):
            return
        tail = self._tail.with_rows(rows, self.manifest.unit)
        added = tail.rows[self._tail.length :]
        check_finite(added)
        self._check_new(added.ids)
        self._notice(batch)
        self.loss_dtype = loss_dtype
        # The rows are taken by the next line, and that the caller knows it is said by the last.
        self._tail = tail
        self._write(partial=False)
        self._tail = self._tail.after()

    def _notice(self, batch: RowBatch) -> None:
        """Say once what makes rows useless and is most likely a mistake."""
        if names := getattr(batch, "random", ()):
            self._say(
                "dropout",
                f"rows are stored of a model with dropout at work in {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}: they are those of one draw. Call "
                "model.eval() before",
            )

    def _check_new(self, ids: Tensor) -> None:
        """Refuse samples that are stored already, and remember the others."""
        if self.manifest.duplicates == "replace":
            return
        if self._seen is None or len(self._seen) != len(self):  # as after an interrupt
            self._seen = SeenIds(self.ids)
        if self._seen.extend(ids):
            return
        for found, how in ((self._seen.known(ids), "stored already"), (twice(ids), "in it twice")):
            if not len(found):
                continue
            more = ", ..." if len(found) > 5 else ""
            raise StoreError(
                f"no row of the batch was stored: samples "
                f"{', '.join(map(str, found[:5].tolist()))}{more} are {how}",
                reason="a sample has one row, unless the store says that later ones replace it",
                remedy="leave out what store.ids has; or make the store with "
                'GradientStore.create(..., duplicates="replace")',
            )
        self._seen.add(ids)

    def _say(self, subject: str, message: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            logger.warning("the store at %s: %s", self.path, message)

    def commit(self) -> None:
        """Write all rows that are not on disk yet.

        The unit that is not full is written as a whole each time, so that committing after every
        small batch costs more than the batches do.

        Raises:
            StoreError: If the store is not open for writing.
            OSError: If writing fails. No row is lost: call it again.
        """
        self._check_writable()
        self._tail = self._tail.unsettled()
        self._write(partial=True)
        self._record()
        self._tail = self._tail.after()

    def _write(self, *, partial: bool) -> None:
        size = self.manifest.unit
        while self._tail.length >= size or (partial and self._tail.length > self._tail.written):
            rows, after = self._tail.split(size)
            write_shard(
                self._part, self.manifest, self._tail.unit, rows, replaced=self._tail.written
            )
            self._tail = after

    def _record(self) -> None:
        """Record how many rows are on disk, if that has changed."""
        if self._recorded != self.committed:
            write_committed(self._part.root, self.manifest, self.committed)
            self._recorded = self.committed

    def _check_writable(self) -> None:
        if self._lock is None:
            raise StoreError(
                f"the store at {self.path} is not open for writing: GradientStore.resume(path, "
                "engine)"
            )
        if not self._lock.held:
            raise StoreError(
                f"the store at {self.path} belongs to the process that this one was forked from"
            )
        self._lock.check_place()


def _losses(dtype: torch.dtype | None) -> str:
    return "no loss" if dtype is None else f"losses of dtype {dtype}"
