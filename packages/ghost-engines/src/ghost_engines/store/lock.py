"""One writer at a time, of a store or of a part of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import weakref
from pathlib import Path

from ghost_engines.files import let_go
from ghost_engines.store.errors import StoreError

LOCK = ".lock"
"""Name of the file that a writer locks. It stays; removing it would let a second writer in."""


JOINING = ".joining"
"""Name of the file that is locked while a writer joins a store."""


class WriterLock:
    """A lock on a store that the kernel releases when its process ends, however it ends.

    A forked child, such as a data loader's worker, does not hold it: otherwise one that outlives a
    killed writer would keep the next one out.

    Args:
        root: Folder of the store, or of a part of it.
        name: Name of the file that is locked.
        wait: Whether to wait for whoever holds it.

    Raises:
        StoreError: If a writer holds it, in this process or another one.
        OSError: If the file system has no locks.
    """

    def __init__(self, root: Path, name: str = LOCK, *, wait: bool = False) -> None:
        self._path = root / name
        # Nothing else than a file is opened: opening a pipe waits for whoever reads it.
        kind = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(self._path, kind, 0o666)
        # Also closed with the lock itself, which an interrupt may have left to nobody.
        self._close = weakref.finalize(self, let_go, self._descriptor)
        _open.add(self._close)
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise StoreError(f"{self._path} is not a file: remove it")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            self.release()
            raise StoreError(
                f"another writer has {root} open: close it first, or open it for reading"
            ) from error
        except OSError as error:
            self.release()
            error.filename = str(self._path)  # flock is given a number, and names no file
            raise
        except BaseException:
            self.release()
            raise

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self._close.alive

    def check_place(self) -> None:
        """Raise if another store stands in the place of the one that was opened.

        Raises:
            StoreError: If it was replaced.
            FileNotFoundError: If it was removed.
        """
        mine, there = os.fstat(self._descriptor), os.stat(self._path)
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise StoreError(
                f"the store at {self._path.parent} was replaced by another while it was open for "
                "writing; rows that were not committed are lost"
            )

    def close(self) -> None:
        """Let the next writer in, as `release` does."""
        self.release()

    def release(self) -> None:
        """Let the next writer in. It can be repeated after an interrupt."""
        if self.held:  # in a forked child it is not: unlocking there would unlock the parent's
            with contextlib.suppress(OSError):  # as closing does
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()
        _open.discard(self._close)


_open: set[weakref.finalize[..., WriterLock]] = set()
"""What closes locks. Not the locks themselves, in a set that forgets them: what Python runs while
objects are cleared away would swallow an interrupt."""


def _close_in_child() -> None:
    for close in _open:
        close()
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
