"""Notices that another store stands where one was opened."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

from ghost_engines.files import let_go, open_regular
from ghost_engines.store.errors import DamagedStoreError, StoreError


class Place:
    """A file that is never replaced as long as a store is there, held open.

    As it is open, no other file can get its number, also once it is removed.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no file.
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = open_regular(path)
        weakref.finalize(self, let_go, self._descriptor)

    def __reduce__(self) -> tuple[Callable[..., Place], tuple[Path]]:
        """Take the place as it is found in another process."""
        return type(self), (self._path,)

    def check(self) -> None:
        """Raise if another store stands there.

        Raises:
            StoreError: If it was replaced.
            DamagedStoreError: If it was removed.
        """
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedStoreError(f"{self._path} is missing") from error
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise StoreError(
                f"the store at {self._path.parent} was replaced by another since it was opened",
                reason="its rows would be taken for those of the one before",
                remedy="open it again with GradientStore.open(path)",
            )
