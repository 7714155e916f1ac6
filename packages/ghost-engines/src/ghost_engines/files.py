"""Files that are there as a whole or not at all, also after a crash."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

TEMPORARY = ".ghost-tmp"
"""Suffix of a file that is being written."""

_IDLE = 3600.0
"""Seconds after which a file to which nobody has written was left by a process that is gone."""


def write_atomically(
    path: Path, data: bytes | Sequence[bytes | memoryview], root: Path, *, shared: bool = False
) -> None:
    """Write or replace a file so that it is on disk, and complete, once this returns.

    Args:
        path: The file, in or below `root`. Folders that are missing between them are made.
        data: Its contents, as a whole or in parts.
        root: A folder that is there, and on disk.
        shared: Whether others may write the same file at the same time, with no lock between them:
            each does under a name of its own then, and the last one stays.

    Raises:
        OSError: If a step fails. Then the old file, or its absence, is as it was, or the new file
            is complete but perhaps not yet safe from a power failure.
    """
    *below, _ = folders = list(_upwards(path.parent, root))
    for folder in reversed(below):
        folder.mkdir(exist_ok=True)
    if shared:
        remove_temporaries(path.parent, idle=_IDLE)
    own = f".{secrets.token_hex(8)}" if shared else ""
    temporary = path.with_name(path.name + own + TEMPORARY)
    try:
        _write(temporary, [data] if isinstance(data, bytes) else data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # A folder made by an earlier process that was killed may not be on disk yet: sync all of them.
    for folder in folders:
        _sync(folder)


def write_json(path: Path, content: object, root: Path, *, indent: int | None = 1) -> None:
    """Write or replace a file of JSON, as `write_atomically` does.

    Raises:
        OSError: If that fails; a file that was there before still is.
    """
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode(), root)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to bit by bit; it is on disk, and complete, once the block ends.

    Args:
        path: The file, in a folder that is there and on disk. If the block ends with an exception,
            the old file, or its absence, is as it was.

    Raises:
        OSError: If a step fails.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with os.fdopen(_create(temporary), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def make_root(path: Path) -> None:
    """Make a folder, with its parents, whose entry is on disk once this returns.

    Raises:
        OSError: If a step fails, or the path or one of its parents is not a folder.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        error.strerror = f"the folder {path} cannot be made: {error.strerror}"
        raise
    for folder in {path, *missing}:
        _sync(folder.parent)


def open_regular(path: Path) -> int:
    """Open a file for reading, and nothing else: on a pipe or a device one may wait forever.

    Returns:
        A descriptor, to be closed with `os.close`.

    Raises:
        ValueError: If it is something else than a file.
        OSError: If it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_waits_for_nobody(path: Path) -> None:
    """Refuse a pipe or a device in the place of a file: who opens it may wait forever.

    Raises:
        OSError: If it is one. What is not there is for whoever opens it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is a pipe or a device, and not a file", str(path))


def let_go(descriptor: int) -> None:
    """Close a file to which nothing was written, so that a failure means nothing to anybody."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def read_regular(path: Path, longest: int) -> bytes:
    """Read a file as a whole.

    Args:
        path: The file.
        longest: The most bytes that it may have.

    Raises:
        ValueError: If it is something else than a file, or longer.
        OSError: If it cannot be read.
    """
    descriptor = open_regular(path)
    try:
        if os.fstat(descriptor).st_size > longest:
            raise ValueError(f"it has more than {longest} bytes")
        parts = []
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def remove_temporaries(folder: Path, *, idle: float = 0) -> None:
    """Remove what writers that were killed have left in a folder.

    Args:
        folder: The folder.
        idle: For how many seconds nobody has written to it, where others may be at work.

    Raises:
        OSError: If it cannot be listed, or something cannot be removed.
    """
    with os.scandir(folder) as entries:
        leftovers = [entry for entry in entries if entry.name.endswith(TEMPORARY)]
    for leftover in leftovers:
        if leftover.is_dir(follow_symlinks=False):
            continue
        if not idle or time.time() - _changed(leftover) > idle:
            Path(leftover.path).unlink(missing_ok=True)


def _changed(entry: os.DirEntry[str]) -> float:
    """Return when a file was written to; now, if another process has removed it."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return time.time()


def put_in_place(made: Path, path: Path) -> None:
    """Rename a file, or a folder of files, that is whole; it is on disk once this returns.

    Args:
        made: What other programs or libraries have written, without a sync.
        path: Where it is to be, in the same folder.

    Raises:
        OSError: If a step fails. Then nothing is at the path, or all of it, but perhaps not yet
            safe from a power failure.
    """
    for each in [*made.iterdir(), made] if made.is_dir() else [made]:
        _sync(each)
    os.rename(made, path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file so that it is gone from the disk once this returns.

    Raises:
        OSError: If a step fails.
    """
    path.unlink()
    _sync(path.parent)


def closed_after(close: Callable[[], object], exception: BaseException | None, lost: str) -> None:
    """Close a writer where a `with` block ends, and let the exception that ended it go on.

    Args:
        close: Writes what is left.
        exception: What ended the block, if anything.
        lost: What to say where closing fails too: in the log, and in a note to the exception.

    Raises:
        Exception: What closing raises, if nothing ended the block.
    """
    try:
        close()
    except Exception as failure:
        if exception is None:
            raise
        logger.exception("and then %s", lost)
        exception.add_note(f"and then {lost}: {type(failure).__name__}: {failure}")


def _create(path: Path) -> int:
    # What stands there may be what a killed writer left, but no link or pipe to write through.
    kind = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | kind, 0o666)


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    descriptor = _create(path)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    yield folder
    while folder != root:
        folder = folder.parent
        yield folder
