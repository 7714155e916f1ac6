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

from ghost_engines.files import make_root
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.lock import WriterLock
from ghost_engines.store.manifest import MANIFEST, Manifest, RowEngine
from ghost_engines.store.reader import StoreReader
from ghost_engines.store.rows import RowBatch, checked
from ghost_engines.store.seen import SeenIds
from ghost_engines.store.shards import (
    Shard,
    check_contents,
    clean,
    find_shards,
    has_shards,
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
        self, path: Path, manifest: Manifest, shards: list[Shard], lock: WriterLock | None
    ) -> None:
        super().__init__(path, manifest, shards)
        self._lock = lock
        self._failed = False
        self._said: set[str] = set()
        self._seen: SeenIds | None = None
        if lock is not None and self._tail.length:
            # A writer replaces the last shard, with a new hash: what is in it must fit the old one.
            check_contents(path, self._tail.unit)
            self._tail = replace(self._tail, parts=(self._part(self._tail.unit).copy(),))

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
            if has_shards(root):
                raise DamagedStoreError(
                    f"{root / MANIFEST} is missing, but there are shards: restore it, or remove "
                    "them"
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
            return cls(root, manifest, find_shards(root, manifest), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: StrPath) -> Self:
        """Open a store for reading.

        Args:
            path: Folder of the store.

        Raises:
            StoreError: If there is none.
            DamagedStoreError: If a file is missing, cut off or of another store.
        """
        root = _root(path)
        manifest = Manifest.read(root)
        return cls(root, manifest, find_shards(root, manifest), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exception: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except Exception as failure:
            if exception is None:
                raise
            lost = "and then the last rows could not be written"
            logger.exception("%s to %s", lost, self.path)
            exception.add_note(f"{lost} to {self.path}: {type(failure).__name__}: {failure}")

    def close(self) -> None:
        """Commit and let the next writer in; the store can still be read.

        Raises:
            OSError: If writing fails; rows that were not acknowledged are lost then.
        """
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if lock.held:
                lock.check_place()
                self._write(partial=True)
        finally:
            self._tail = self._tail.written_out()
            lock.release()

    # Writing

    def append(self, batch: RowBatch, loss: Tensor | None = None) -> None:
        """Add rows, and write every unit that they fill.

        Samples that are stored already, and rows of a model in which dropout was at work, are
        taken; a warning says so, once for a store.

        Args:
            batch: Has `ids`, int64 `[N]`, and `rows`, `[N, k_total]` in the store's dtype, on any
                device. Both are copied.
            loss: The samples' losses `[N]`, floating point; for all batches of a store or none.

        Raises:
            StoreError: If the store is not open for writing, a shape or dtype does not fit, or a
                row is not finite. The store is as it was before.
            DamagedStoreError: If a file went missing since the store was opened.
            OSError: If writing fails. The rows are taken nevertheless: do not append them again.
                Call `commit`, which tries again; no other batch is accepted before it succeeds.
        """
        self._check_writable()
        if self._failed:
            raise StoreError(
                "an earlier write failed, whose rows were taken: call commit() to try again; do "
                "not append them again"
            )
        rows = checked(batch, loss, self.manifest)
        loss_dtype = None if rows.loss is None else rows.loss.dtype
        if len(self) and loss_dtype != self.loss_dtype:
            raise StoreError(
                f"the rows so far have {_losses(self.loss_dtype)}, these {_losses(loss_dtype)}"
            )
        if len(rows):
            self._notice(batch, rows.ids)
            self.loss_dtype = loss_dtype
            self._tail = self._tail.with_rows(rows)
            self._write(partial=False)

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
        if self._seen is None:
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
        self._write(partial=True)

    def _write(self, *, partial: bool) -> None:
        size = self.manifest.unit
        self._failed = True
        while self._tail.length >= size or (partial and self._tail.length > self._tail.written):
            rows, after = self._tail.split(size)
            write_shard(self.path, self.manifest, self._tail.unit, rows)
            self._tail = after
        self._failed = False

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
    return Path(path).absolute()


def _listed(differences: list[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join([*differences[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _losses(dtype: torch.dtype | None) -> str:
    return "no loss" if dtype is None else f"losses of dtype {dtype}"
