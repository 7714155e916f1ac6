"""One writer at a time."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from ghost_engines.store.errors import StoreError

LOCK = ".lock"
"""Name of the file that a writer locks. It stays; removing it would let a second writer in."""


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
        self._file = open(root / LOCK, "ab")  # noqa: SIM115 - it is held until `release`
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

    def release(self) -> None:
        """Let the next writer in."""
        self._file.close()


_open_locks: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_open_locks):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
