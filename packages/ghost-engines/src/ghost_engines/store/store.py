"""A store of rows that never loses or duplicates one that it has acknowledged."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ghost_engines.files import make_root
from ghost_engines.store.beside import Column
from ghost_engines.store.data_files import DataFile
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.listing import clean, has_shards
from ghost_engines.store.lock import WriterLock
from ghost_engines.store.manifest import MANIFEST, Manifest, RowEngine
from ghost_engines.store.record import RECORD, read_record
from ghost_engines.store.shards import (
    find_shards,
)
from ghost_engines.store.writer import StoreWriter

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]

_SHOWN = 6  # differences between a store's rows and an engine's


class GradientStore(StoreWriter):
    """Rows `[N, k_total]` with their sample ids on disk, in the order in which they were appended.

    Make one with `create`, `resume` or `open`. A writer is a context manager: leaving it commits.
    Rows are acknowledged, which means safe from whatever happens to the process or the machine,
    once `append` has filled a unit with them or `commit` has returned; `committed` counts them.
    All rows that were appended can be read at once.

    One process writes at a time; any number may read meanwhile, and see the store as it was when
    they opened it. A store is not made for use by several threads.
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
            notes: Whatever is worth remembering, as JSON-able values. Not compared with anything.

        Raises:
            StoreError: If there is a store already, another writer has it open, or an argument
                does not fit.
            OSError: If it cannot be written.
        """
        root = _root(path)
        manifest = Manifest.of(
            engine, unit=unit, info=info, notes=notes, columns=columns, data=data
        )
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
        now = manifest.renewed(engine, columns=columns, info=info, data=data)
        if differences := manifest.differences(now):
            raise StoreError(
                f"the rows would not be those of the store at {root}: {_listed(differences)}",
                reason="rows that were made in another way cannot be compared",
                remedy="make the engine, info and columns as they were when the store was made, "
                "or make another store with GradientStore.create(path, engine)",
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
