"""Notices that another store stands where one was opened."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from ghost_engines.files import open_regular
from ghost_engines.store.errors import DamagedStoreError, StoreError


class Place:
    """A file that is never replaced as long as a store is there, held in use.

    It is mapped, so that no other file can get its number, also once it is removed. Nothing has to
    be closed: what Python runs while objects are cleared away would swallow an interrupt.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no file, or empty.
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        descriptor = open_regular(path)
        try:
            self._identity = _identity(os.fstat(descriptor))
            self._held = mmap.mmap(descriptor, 1, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Callable[..., Place], tuple[Path]]:
        """Take the place as it is found in another process."""
        return type(self), (self._path,)

    def check(self) -> None:
        """Raise if another store stands there.

        Raises:
            StoreError: If it was replaced.
            DamagedStoreError: If it was removed.
        """
        try:
            there = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedStoreError(f"{self._path} is missing") from error
        if _identity(there) != self._identity:
            raise StoreError(
                f"the store at {self._path.parent} was replaced by another since it was opened",
                reason="its rows would be taken for those of the one before",
                remedy="open it again with GradientStore.open(path)",
            )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
