"""Files that are there as a whole or not at all, also after a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".ghost-tmp"
"""Suffix of a file that is being written."""


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
