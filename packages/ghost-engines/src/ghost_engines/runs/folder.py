"""The folder of a run: what it was, what each step credited, its metrics, its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from ghost_core import CaptureError
from ghost_core.restoring import Leave, undo
from ghost_engines.files import make_root, write_json
from ghost_engines.log import LOG, RANK, ScoreLog, has_log
from ghost_engines.processes import process_rank
from ghost_engines.runs.checkpoint import several, write_checkpoint
from ghost_engines.runs.description import Description, check_same
from ghost_engines.runs.metrics import Metrics
from ghost_engines.store import WriterLock

DESCRIPTION = "run.json"


class RunExistsError(CaptureError):
    """A run that begins in the folder of another.

    Args:
        path: The folder.
        remedy: How to go on with the run that is there.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path = path
        super().__init__(
            f"there is a run in {path} already",
            reason="its log would go on with steps of another",
            remedy=f"{remedy}, or choose another folder",
        )


def place_of(folder: str | Path) -> Path:
    """Return where this process writes: the folder, or one in it where there are several."""
    root = Path(folder).absolute()
    return root / f"{RANK}{process_rank()}" if several() else root


def lock_folder(path: Path) -> WriterLock:
    """Make the folder of a process, if it is not there, and lock it.

    Raises:
        CaptureError: If the path is a file.
        StoreError: If another run has it open.
        OSError: If it cannot be made.
    """
    if path.is_file():
        raise CaptureError(f"{path} is a file; a run writes a folder")
    make_root(path)
    return WriterLock(path)


class RunFolder:
    """Writes the folder of a run; a context manager, which commits when it is left.

    Args:
        path: The folder, which is there.
        log: The log, open for writing, if steps are logged.
        metrics: The metrics.
        lock: The lock on the folder, which is let go of when it is left.

    Attributes:
        path: The folder.
        log: The log, or None.
        metrics: The metrics.
    """

    def __init__(
        self, path: Path, log: ScoreLog | None, metrics: Metrics, lock: WriterLock
    ) -> None:
        self.path, self.log, self.metrics = path, log, metrics
        self._stack = ExitStack()
        undo(self._stack, lock.release)
        if log is not None:
            self._stack.callback(log.close)  # once more, where an interrupt ends the first
            self._stack.enter_context(log)
        self._stack.callback(metrics.write)

    @classmethod
    def open(
        cls,
        path: Path,
        now: Description,
        *,
        after: int | None,
        logs: bool,
        lock: WriterLock | None = None,
    ) -> Self:
        """Begin a folder, or go on with one.

        Args:
            path: The folder; missing ones are made.
            now: What the run is.
            after: The last step to keep; None for a run that begins.
            logs: Whether steps are logged.
            lock: The lock on the folder, where there is one already.

        Raises:
            CaptureError: If there is a run already, and this one begins, or it was another, or the
                path is a file, or a file in it is damaged.
            StoreError: If the log ends before that step, or another run has the folder open.
            DamagedStoreError: If the log is damaged.
            OSError: If it cannot be written.
        """
        with ExitStack() as stack:
            lock = lock or lock_folder(path)
            undo(stack, lock.release)
            _describe(path, now, begins=after is None)
            log = None
            if logs:
                place, there = path / LOG, has_log(path / LOG)
                log = ScoreLog.resume(place, after=after or 0) if there else ScoreLog.create(place)
            folder = cls(path, log, Metrics(path, after or 0), lock)
            stack.pop_all()
        return folder

    def __enter__(self) -> Self:
        return self

    __exit__: Callable[..., None] = Leave(attrgetter("_stack.__exit__"))

    def commit(self) -> None:
        """Have all of it on disk.

        Raises:
            OSError: If that fails.
        """
        self.metrics.write()
        if self.log is not None:
            self.log.commit()

    def save(self, state: Mapping[str, Any]) -> None:
        """Write or replace the checkpoint.

        Raises:
            OSError: If that fails; then the last one is still there.
        """
        write_checkpoint(self.path, state)


def _describe(path: Path, now: Description, *, begins: bool) -> None:
    """Write what a run is into its folder, or compare it with what is there."""
    description = path / DESCRIPTION
    if not description.exists():
        write_json(description, now, path)
        return
    if begins:
        raise RunExistsError(
            path, "call run.resume(...) or run.load_state_dict(...) first to go on with it"
        )
    try:
        found = json.loads(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CaptureError(
            f"{description} is no JSON, or damaged: {error}",
            remedy="restore the file from a copy, or begin a run in another folder",
        ) from error
    check_same(found, now, str(description))
