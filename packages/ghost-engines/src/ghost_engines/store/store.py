"""A store of rows that never loses or duplicates one that it has acknowledged."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from copy import copy
from pathlib import Path
from typing import Any, Self

from ghost_engines.files import make_root
from ghost_engines.store.beside import Column, check_new
from ghost_engines.store.committed import COMMITTED, check_committed, read_committed
from ghost_engines.store.data_files import DataFile
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.held_rows import HeldRows
from ghost_engines.store.listing import clean, has_shards
from ghost_engines.store.lock import JOINING, WriterLock
from ghost_engines.store.manifest import MANIFEST, Manifest, RowEngine
from ghost_engines.store.origin import OtherRowsError
from ghost_engines.store.parts import (
    PARTS,
    REGISTER,
    Part,
    has_parts,
    part_name,
    register,
    registered,
)
from ghost_engines.store.shards import Shard, find_shards
from ghost_engines.store.writer import StoreWriter

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]


class GradientStore(StoreWriter):
    """Rows `[N, k_total]` with their sample ids on disk, in the order in which they were appended.

    Make one with `create`, `resume` or `open`. A writer is a context manager: leaving it commits.
    Rows are acknowledged, which means safe from whatever happens to the process or the machine,
    once `append` has filled a unit with them or `commit` has returned; `committed` counts them.
    All rows that were appended can be read at once.

    One process writes a store that was made with `create`. Several write one that each of them has
    opened with `join`, in a part of its own. Any number may read meanwhile, and see the store as it
    was when they opened it. A store is not made for use by several threads.
    """

    # Opening and closing

    @classmethod
    def create(
        cls,
        path: StrPath,
        engine: RowEngine,
        *,
        unit: int = 4096,
        columns: Mapping[str, str | Column] | None = None,
        info: Mapping[str, Any] | None = None,
        data: Sequence[DataFile] | None = None,
        duplicates: str = "error",
        notes: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a new store and open it for writing.

        Args:
            path: Folder of the store; missing folders are made.
            engine: Where the rows come from.
            unit: Rows per shard. A shard is also what a writer keeps in memory.
            columns: What is stored beside the rows, by name, as
                `{"norm": "float32", "group": "category", "begin": "int64"}`: dtypes of numbers,
                finite unless `Column(dtype, finite=False)` says otherwise, or `category` for
                strings of which there are few. Every batch must have all of them. Losses need
                not be declared; those that are, as `loss`, must be there.
            info: What else changes a value of a row, such as a digest of the model or the name of
                the loss, as JSON-able values. A resume must give the same.
            data: Where the samples come from, such as `[DataFile.of("corpus.jsonl")]`. A resume
                that gives data must give the same, wherever they are now.
            duplicates: What becomes of a sample that is stored already: an `error`, or its later
                row is to `replace` the earlier one wherever the store is opened for reading.
            notes: Whatever is worth remembering, as JSON-able values. Not compared with anything.

        Raises:
            StoreError: If there is a store already, another writer has it open, or an argument
                does not fit.
            OSError: If it cannot be written.
        """
        root = _root(path)
        manifest = Manifest.of(
            engine,
            unit=unit,
            info=info,
            notes=notes,
            columns=columns,
            data=data,
            duplicates=duplicates,
        )
        check_new(manifest.columns)
        _make(root)
        lock = WriterLock(root)
        try:
            if (root / MANIFEST).exists():
                raise StoreError(
                    f"there is a store at {root} already: go on with GradientStore.resume(path, "
                    "engine), or read it with GradientStore.open(path)"
                )
            _check_empty(root)
            manifest.write(root)
            store = cls(root, manifest, [(Part(root), [])], lock)
            store._made = True
            return store
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(
        cls,
        path: StrPath,
        engine: RowEngine,
        *,
        columns: Mapping[str, str | Column] | None = None,
        info: Mapping[str, Any] | None = None,
        data: Sequence[DataFile] | None = None,
    ) -> Self:
        """Open a store for writing, after its committed rows.

        `store.ids` tells which samples are done.

        Args:
            path: Folder of the store.
            engine: Where the rows come from; as when the store was made.
            columns: As when the store was made, if they are given.
            info: As when the store was made.
            data: As when the store was made, if they are given, but for the paths.

        Raises:
            StoreError: If there is no store, its rows are not of the kind that would be appended,
                or another writer has it open.
            DamagedStoreError: If a file is missing, cut off or of another store.
            OSError: If it cannot be written.
        """
        root = _root(path)
        manifest = Manifest.read(root)
        _check_same(root, manifest, manifest.renewed(engine, columns=columns, info=info, data=data))
        if has_parts(root):
            raise StoreError(
                f"the store at {root} is written in parts, by writers that joined it",
                reason="each part has a writer of its own",
                remedy='go on with GradientStore.join(path, engine, part="..."), as before',
            )
        return cls._writing(root, manifest, Part(root), WriterLock(root))

    @classmethod
    def join(
        cls,
        path: StrPath,
        engine: RowEngine,
        *,
        part: str | tuple[int, int],
        unit: int = 4096,
        columns: Mapping[str, str | Column] | None = None,
        info: Mapping[str, Any] | None = None,
        data: Sequence[DataFile] | None = None,
        duplicates: str = "error",
        notes: Mapping[str, Any] | None = None,
    ) -> Self:
        """Open a part of a store for writing, while others write other parts.

        Makes the store and the part if they are not there, and else goes on after the part's
        committed rows. Nobody has to come first, or wait for others. What is returned holds the
        rows of the part alone: `store.ids` tells which samples its writer has done, and
        `GradientStore.open(path)` reads those of all. There the first unit of each part comes
        before the second of any, so that units of data that are dealt out in turn are in order.

        Args:
            path: Folder of the store; missing folders are made.
            engine: Where the rows come from; the same for all writers, as all that follows.
            part: Who writes: `(rank, world)`, or a name that no other writer has.
            unit: As of `create`.
            columns: As of `create`.
            info: As of `create`.
            data: As of `create`.
            duplicates: As of `create`; an error concerns the part alone.
            notes: As of `create`; those of the writer that makes the store are kept.

        Raises:
            StoreError: If the store's rows are not of the kind that would be appended, another
                writer has the part, the store is written by one writer without parts, or an
                argument does not fit.
            DamagedStoreError: If a file is missing, cut off or of another store.
            OSError: If it cannot be written.
        """
        root, name = _root(path), part_name(part)
        manifest = Manifest.of(
            engine,
            unit=unit,
            info=info,
            notes=notes,
            columns=columns,
            data=data,
            duplicates=duplicates,
        )
        if not (root / MANIFEST).exists():
            check_new(manifest.columns)
        _make(root)
        # Whoever joins waits for others that do, and refuses a writer of the store as a whole.
        with closing(WriterLock(root, JOINING, wait=True)), closing(WriterLock(root)):
            if (root / MANIFEST).exists():
                there = Manifest.read(root)
                _check_same(root, there, manifest)
                manifest = there
            else:
                _check_empty(root)
                manifest.write(root)
            if has_shards(root) or (root / COMMITTED).exists():
                raise StoreError(
                    f"the store at {root} was written by one writer, and has no parts",
                    reason="rows of several writers are kept apart",
                    remedy="go on with GradientStore.resume(path, engine), or join another store",
                )
            own = register(root, manifest, name)
        return cls._writing(root, manifest, own, WriterLock(own.root))

    @classmethod
    def _writing(cls, root: Path, manifest: Manifest, part: Part, lock: WriterLock) -> Self:
        """Open a part whose lock is held."""
        try:
            # Whoever had made the store may have withdrawn it before this writer had the lock.
            _check_same(root, Manifest.read(root), manifest)
            clean(part.root)
            recorded, shards = _read(part, manifest)
            return cls(root, manifest, [(part, shards)], lock, recorded=recorded)
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
        parts = registered(root, manifest) or [Part(root)]
        found = [(part, _read(part, manifest)[1]) for part in parts]
        store = cls(root, manifest, found, None, check=check)
        if manifest.duplicates == "replace":
            store._leave_out_replaced()
        return store

    def held(self, progress: bool | None = None) -> Self:
        """Return the store with all its rows in memory, for many searches.

        They are read here, once, and compared with their hashes as ever. Searches, tables of
        scores and whitenings among them find what they find in the store, and read nothing; what
        is beside the rows is read from the files, and so are `rows()` and `blocks()`. It takes as
        much memory as the rows do on disk, and is let go with what is returned.

        Args:
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Raises:
            StoreError: If the store is open for writing.
            DamagedStoreError: If a file went missing or was altered.
            OSError: If a file cannot be read.
            RuntimeError: If there is not as much memory.
        """
        if self._lock is not None:
            raise StoreError(
                f"the store at {self.path} is open for writing, and cannot be held in memory",
                reason="what is held are the rows that there were at some time",
                remedy="close it, or hold what is on disk: GradientStore.open(path).held()",
            )
        if self._held is not None:
            return self
        shape = len(self), self.k_total
        found = HeldRows.of(self.scan(), shape, self.dtype, progress)
        store = copy(self)
        store._held = found
        return store


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


def _make(root: Path) -> None:
    """Make the folder of a store."""
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file; a store is a folder")
    make_root(root)


def _check_empty(root: Path) -> None:
    """Raise if a folder without a manifest has rows, and remove what killed writers left."""
    if has_shards(root) or (root / COMMITTED).exists():
        raise DamagedStoreError(
            f"{root / MANIFEST} is missing, but there are shards: restore it, or remove them and "
            f"{root / COMMITTED}"
        )
    if has_parts(root):
        raise DamagedStoreError(
            f"{root / MANIFEST} is missing, but there are parts of a store: restore it, or remove "
            f"{root / PARTS} and {root / REGISTER}"
        )
    clean(root)


def _check_same(root: Path, manifest: Manifest, now: Manifest) -> None:
    """Raise if the rows that would be appended are not of the kind of those of a store."""
    if manifest.differences(now):
        raise OtherRowsError(root, manifest, now)
    if manifest.versions != now.versions:
        logger.warning(
            "the store at %s was made with %s; now: %s", root, manifest.versions, now.versions
        )


def _read(part: Part, manifest: Manifest) -> tuple[int, list[Shard]]:
    """Return how many rows a part must have, and its shards, of which it has as many."""
    # A writer may add to the part meanwhile, so what must be there is read first.
    recorded = read_committed(part.root, manifest)
    shards = find_shards(part, manifest)
    check_committed(part.root, recorded, sum(shard.n for shard in shards))
    return recorded, shards
