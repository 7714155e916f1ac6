"""A store of rows that never loses or duplicates one that it has acknowledged."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ghost_engines.files import closed_after, make_root
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.listing import clean, has_shards
from ghost_engines.store.lock import WriterLock
from ghost_engines.store.manifest import MANIFEST, Manifest, RowEngine
from ghost_engines.store.origin import check_origin, check_verified
from ghost_engines.store.reader import StoreReader
from ghost_engines.store.record import RECORD, check_record, read_record, write_record
from ghost_engines.store.rows import RowBatch, check_finite, checked
from ghost_engines.store.seen import SeenIds
from ghost_engines.store.shards import (
    Shard,
    check_contents,
    find_shards,
    rows_of,
    write_shard,
)

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]

_SHOWN = 6  # differences between a store's rows and an engine's


class GradientStore(StoreReader):
    """Rows `[N, k_total]` with their sample ids on disk, in the order in which they were appended.

    Make one with `create`, `resume` or `open`. A writer is a context manager: leaving it commits.
    Rows are acknowledged, which means safe from whatever happens to the process or the machine,
    once `append` has filled a unit with them or `commit` has returned; `committed` counts them.
    All rows that were appended can be read at once.

    One process writes at a time; any number may read meanwhile, and see the store as it was when
    they opened it. A store is not made for use by several threads.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        shards: list[Shard],
        lock: WriterLock | None,
        *,
        recorded: int = 0,
        check: bool = True,
    ) -> None:
        super().__init__(path, manifest, shards, check=check)
        check_record(path, recorded, len(self))
        self._lock = lock
        self._recorded = recorded
        self._origin: object = None
        self._said: set[str] = set()
        self._seen: SeenIds | None = None
        if lock is not None and self._tail.length:
            # A writer replaces the last shard, with a new hash: what is in it must fit the old one.
            with self._opened(self._tail.unit) as file:
                check_contents(file)
                rows = rows_of(file)[: self._tail.length].copy()
            self._tail = replace(self._tail, memory=rows)

    def __repr__(self) -> str:
        """Say where it is, what is in it, and whether it is open for writing."""
        facts = [str(self.path), f"{len(self)} rows of {self.k_total} {self.manifest.dtype}"]
        if waiting := len(self) - self.committed:
            facts.append(f"{waiting} not committed")
        if self._lock is not None:
            facts.append("open for writing")
        return f"<{type(self).__name__}: {', '.join(facts)}>"

    # Opening and closing

    @classmethod
    def create(
        cls,
        path: StrPath,
        engine: RowEngine,
        *,
        unit: int = 4096,
        info: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a new store and open it for writing.

        Args:
            path: Folder of the store; missing folders are made.
            engine: Where the rows come from.
            unit: Rows per shard. A shard is also what a writer keeps in memory.
            info: What else changes a value of a row, such as digests of the model and the data or
                the name of the loss, as JSON-able values. A resume must give the same.
            notes: Whatever is worth remembering, as JSON-able values. Not compared with anything.

        Raises:
            StoreError: If there is a store already, another writer has it open, or an argument
                does not fit.
            OSError: If it cannot be written.
        """
        root = _root(path)
        manifest = Manifest.of(engine, unit=unit, info=info, notes=notes)
        if root.exists() and not root.is_dir():
            raise StoreError(f"{root} is a file; a store is a folder")
        make_root(root)
        lock = WriterLock(root)
        try:
            if (root / MANIFEST).exists():
                raise StoreError(
                    f"there is a store at {root} already: go on with GradientStore.resume(path, "
                    "engine), or read it with GradientStore.open(path)"
                )
            if has_shards(root) or (root / RECORD).exists():
                raise DamagedStoreError(
                    f"{root / MANIFEST} is missing, but there are shards: restore it, or remove "
                    f"them and {root / RECORD}"
                )
            clean(root)
            manifest.write(root)
            return cls(root, manifest, [], lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(
        cls, path: StrPath, engine: RowEngine, *, info: Mapping[str, Any] | None = None
    ) -> Self:
        """Open a store for writing, after its committed rows.

        `store.ids` tells which samples are done.

        Args:
            path: Folder of the store.
            engine: Where the rows come from; as when the store was made.
            info: As when the store was made.

        Raises:
            StoreError: If there is no store, its rows are not of the kind that would be appended,
                or another writer has it open.
            DamagedStoreError: If a file is missing, cut off or of another store.
            OSError: If it cannot be written.
        """
        root = _root(path)
        manifest = Manifest.read(root)
        now = Manifest.of(engine, unit=manifest.unit, info=info)
        if differences := manifest.differences(now):
            raise StoreError(
                f"the rows would not be those of the store at {root}: {_listed(differences)}",
                reason="rows that were made in another way cannot be compared",
                remedy="make the engine and info as they were when the store was made, or make "
                "another store with GradientStore.create(path, engine)",
            )
        if manifest.versions != now.versions:
            logger.warning(
                "the store at %s was made with %s; now: %s", root, manifest.versions, now.versions
            )
        lock = WriterLock(root)
        try:
            clean(root)
            recorded = read_record(root, manifest)
            return cls(root, manifest, find_shards(root, manifest), lock, recorded=recorded)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: StrPath, *, check: bool = True) -> Self:
        """Open a store for reading.

        Args:
            path: Folder of the store.
            check: Whether to compare each shard with its hash when it is read for the first time.
                Without it, rows that the disk or another program altered are not noticed before
                `verify` is called.

        Raises:
            StoreError: If there is none.
            DamagedStoreError: If a file is missing, cut off or of another store.
            OSError: If a file or folder cannot be read.
        """
        root = _root(path)
        manifest = Manifest.read(root)
        # A writer may add to the store meanwhile, so what must be there is read first.
        recorded = read_record(root, manifest)
        shards = find_shards(root, manifest)
        return cls(root, manifest, shards, None, recorded=recorded, check=check)

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

    # Writing

    def append(self, batch: RowBatch, loss: Tensor | None = None) -> None:
        """Add rows, and write every unit that they fill.

        Samples that are stored already, and rows of a model in which dropout was at work, are
        taken; a warning says so, once for a store.

        Args:
            batch: Has `ids`, int64 `[N]`, and `rows`, `[N, k_total]` in the store's dtype, on any
                device. Both are copied. If it has a `manifest`, as what engines collect, that must
                be the one of the engine that the store was made with; if it has `verified`, it
                must be as the store says.
            loss: The samples' losses `[N]`, floating point; for all batches of a store or none.

        Raises:
            StoreError: If the store is not open for writing, a shape or dtype does not fit, a row
                is not finite, or rows are of another engine or not verified. The store is as it
                was before.
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
        rows = checked(batch, loss, self.manifest)
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
        self._notice(batch, added.ids)
        self.loss_dtype = loss_dtype
        # The rows are taken by the next line, and that the caller knows it is said by the last.
        self._tail = tail
        self._write(partial=False)
        self._tail = self._tail.after()

    def _notice(self, batch: RowBatch, ids: Tensor) -> None:
        """Say once what makes rows useless and is most likely a mistake."""
        if names := getattr(batch, "random", ()):
            self._say(
                "dropout",
                f"rows are stored of a model with dropout at work in {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}: they are those of one draw. Call "
                "model.eval() before",
            )
        if "ids" in self._said:
            return
        if self._seen is None or len(self._seen) != len(self):  # as after an interrupt
            self._seen = SeenIds(self.ids)
        if len(known := self._seen.known(ids)):
            self._seen = None
            self._say("ids", f"samples {known[:5].tolist()} are stored a second time")
        else:
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
                self.path, self.manifest, self._tail.unit, rows, replaced=self._tail.written
            )
            self._tail = after

    def _record(self) -> None:
        """Record how many rows are on disk, if that has changed."""
        if self._recorded != self.committed:
            write_record(self.path, self.manifest, self.committed)
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


def _root(path: StrPath) -> Path:
    """Return the folder of a store."""
    if not isinstance(path, str | os.PathLike):
        raise StoreError(
            f"{path!r} is no path of a store",
            reason=f"it is of type {type(path).__name__}",
            remedy="give the folder of the store first, as a str or a Path",
        )
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it has a null character")
    except ValueError as error:
        raise StoreError(
            f"there is no store at {os.fspath(path)!r}: no file can have that name",
            reason=str(error),
            remedy="give the folder of the store first",
        ) from error
    return Path(path).absolute()


def _listed(differences: list[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join([*differences[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _losses(dtype: torch.dtype | None) -> str:
    return "no loss" if dtype is None else f"losses of dtype {dtype}"
