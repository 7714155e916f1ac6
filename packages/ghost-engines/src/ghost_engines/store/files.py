"""Files that are there as a whole or not at all, also after a crash, and one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from ghost_engines.store.errors import StoreError

TEMPORARY = ".ghost-tmp"
"""Suffix of a file that is being written."""

LOCK = ".lock"
"""Name of the file that a writer locks. It stays; removing it would let a second writer in."""


def write_atomically(path: Path, data: bytes, root: Path) -> None:
    """Write or replace a file so that it is on disk, and complete, once this returns.

    Args:
        path: The file, in or below `root`. Folders that are missing between them are made.
        data: Its contents.
        root: A folder that is there, and on disk.

    Raises:
        OSError: If a step fails. Then the old file, or its absence, is as it was, or the new file
            is complete but perhaps not yet safe from a power failure.
    """
    *below, _ = folders = list(_upwards(path.parent, root))
    for folder in reversed(below):
        folder.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        _write(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # A folder made by an earlier process that was killed may not be on disk yet: sync all of them.
    for folder in folders:
        _sync_folder(folder)


def make_root(path: Path) -> None:
    """Make a folder, with its parents, whose entry is on disk once this returns.

    Raises:
        OSError: If a step fails, or the path or one of its parents is not a folder.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    os.makedirs(path, exist_ok=True)
    for folder in {path, *missing}:
        _sync_folder(folder.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    yield folder
    while folder != root:
        folder = folder.parent
        yield folder


class WriterLock:
    """A lock on a store that the kernel releases when its process ends, however it ends.

    A forked child, such as a data loader's worker, does not hold it: otherwise one that outlives a
    killed writer would keep the next one out.

    Args:
        root: Folder of the store.

    Raises:
        StoreError: If a writer holds it, in this process or another one.
        OSError: If the file system has no locks.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        self._file = open(self._path, "ab")  # noqa: SIM115 - it is held until `release`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise StoreError(
                f"another writer has {root} open: close it first, or read with "
                "GradientStore.open(path)"
            ) from error
        except BaseException:
            self._file.close()
            raise
        _open_locks.add(self)

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return not self._file.closed

    def check_place(self) -> None:
        """Raise if another store stands in the place of the one that was opened.

        Raises:
            StoreError: If it was replaced.
            FileNotFoundError: If it was removed.
        """
        mine, there = os.fstat(self._file.fileno()), os.stat(self._path)
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise StoreError(
                f"the store at {self._path.parent} was replaced by another while it was open for "
                "writing; rows that were not committed are lost"
            )

    def release(self) -> None:
        """Let the next writer in."""
        self._file.close()


_open_locks: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_open_locks):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
