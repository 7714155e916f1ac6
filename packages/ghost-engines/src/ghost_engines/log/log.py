"""A log of steps that never loses or doubles one that it has acknowledged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Self

from ghost_core.arguments import whole
from ghost_engines.files import closed_after, make_root
from ghost_engines.log.manifest import Manifest, make_log
from ghost_engines.log.reader import LogReader
from ghost_engines.log.shards import Shard, find_shards, read_shard, remove_shard, write_shard
from ghost_engines.log.steps import Steps, Tail, checked
from ghost_engines.store import StoreError, WriterLock, clean
from ghost_engines.values import CreditedStep

logger = logging.getLogger(__name__)


class ScoreLog(LogReader):
    """What each step of training credited to its samples, on disk.

    Make one with `create`, `resume` or `open`. A writer is a context manager: leaving it commits.

        with ScoreLog.create("runs/log") as log:
            values.on_credit(log.append)
            ...

    Steps are known by their numbers, which increase. They are acknowledged, which means safe from
    whatever happens to the process or the machine, once `append` has filled a shard with them or
    `commit` has returned; `committed` is the last of them. Commit the log before a checkpoint of
    the model is saved, and resume it after that checkpoint's step: then the log is always that of
    the run that goes on.

    Memory is taken for the steps of one shard. One process writes at a time; any number may read
    meanwhile, and see the log as it was when they opened it.
    """

    def __init__(
        self, path: Path, manifest: Manifest, shards: list[Shard], lock: WriterLock | None
    ) -> None:
        super().__init__(path, manifest, shards)
        self._lock = lock
        self._failed = False
        if lock is not None and shards and shards[-1].size < manifest.unit:
            # A writer replaces the last shard, with a new hash: what is in it must fit the old one.
            unit = len(shards) - 1
            found = read_shard(path, unit, checked=True)
            steps = tuple(checked(each, None, ()) for each in found.split(self.directions))
            tail = Tail(unit, steps, shards[-1].size, len(steps))
            self._contents = tuple(shards[:-1]), tail

    # Opening and closing

    @classmethod
    def create(cls, path: str | Path, *, unit: int = 65_536) -> Self:
        """Make a new log and open it for writing.

        Args:
            path: Folder of the log; missing folders are made.
            unit: Rows of a full shard: one for each step, and one for each of its samples. A shard
                is also what a writer keeps in memory.

        Raises:
            StoreError: If there is a log already, another writer has it open, or `unit` is no
                positive number.
            OSError: If it cannot be written.
        """
        root = Path(path).absolute()
        manifest = Manifest.new(whole("unit", unit, least=1, error=StoreError))
        if root.exists() and not root.is_dir():
            raise StoreError(f"{root} is a file; a score log is a folder")
        make_root(root)
        lock = WriterLock(root)
        try:
            clean(root)
            make_log(root, manifest)
            return cls(root, manifest, [], lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(cls, path: str | Path, *, after: int) -> Self:
        """Open a log for writing where training goes on, and drop the steps that came later.

        What counts is the run that goes on: where training resumes from a checkpoint that is older
        than the log, the steps after it are made anew, and the log's are dropped.

        Args:
            path: Folder of the log.
            after: Number of the last step to keep: that of the checkpoint; 0 to start again.

        Raises:
            StoreError: If there is no log, it ends before that step, or another writer has it open.
            DamagedStoreError: If a file is missing, cut off or of another log.
            OSError: If it cannot be written.
        """
        root = Path(path).absolute()
        after = whole("after", after, least=0, error=StoreError)
        manifest = Manifest.read(root)
        lock = WriterLock(root)
        try:
            clean(root)
            shards = find_shards(root, manifest)
            last = shards[-1].last if shards else 0
            if last < after:
                raise StoreError(
                    f"the log at {root} ends with step {last}, before step {after}",
                    reason="steps that were not committed are lost when a process is killed",
                    remedy="resume training from a checkpoint of an earlier step, and commit the "
                    "log before each checkpoint; or go on in a new log",
                )
            return cls(root, manifest, _truncated(root, manifest, shards, after), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a log for reading.

        Args:
            path: Folder of the log.

        Raises:
            StoreError: If there is none.
            DamagedStoreError: If a file is missing, cut off or of another log.
        """
        root = Path(path).absolute()
        manifest = Manifest.read(root)
        return cls(root, manifest, find_shards(root, manifest), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exception: BaseException | None, traceback: object) -> None:
        lost = f"the last steps could not be written to {self.path}"
        closed_after(self.close, exception, lost)

    def close(self) -> None:
        """Commit and let the next writer in; the log can still be read.

        Raises:
            OSError: If writing fails; steps that were not acknowledged are lost then.
        """
        if (lock := self._lock) is None:
            return
        try:
            if lock.held:
                lock.check_place()
                self._write()
        finally:
            shards, tail = self._contents
            self._contents = shards, tail.written_out()
            lock.release()
            self._lock = None  # last, so that it can be repeated after an interrupt

    # Writing

    def append(self, step: CreditedStep) -> None:
        """Add a step, and write the shard that it fills.

        Args:
            step: What a step credited. It is copied.

        Raises:
            StoreError: If the log is not open for writing, the step does not come after the last
                one, or its directions, a shape or a dtype do not fit. The log is as it was before.
            OSError: If writing fails. The step is taken nevertheless: do not append it again. Call
                `commit`, which tries again; no other step is accepted before it succeeds.
        """
        self._check_writable()
        if self._failed:
            raise StoreError(
                "an earlier write failed, whose steps were taken: call commit() to try again; do "
                "not append them again"
            )
        shards, tail = self._contents
        tail = tail.with_step(checked(step, self.last, self.directions))
        self._contents = shards, tail
        if tail.size >= self._manifest.unit:
            self._write()

    def commit(self) -> None:
        """Write all steps that are not on disk yet.

        The shard that is not full is written as a whole each time.

        Raises:
            StoreError: If the log is not open for writing.
            OSError: If writing fails. No step is lost: call it again.
        """
        self._check_writable()
        self._write()

    def _write(self) -> None:
        shards, tail = self._contents
        if tail.written == len(tail.steps):
            return
        self._failed = True
        steps = Steps.of(tail.steps)
        shard = write_shard(self.path, self._manifest, tail.unit, steps, self.directions)
        full = tail.size >= self._manifest.unit
        self._contents = ((*shards, shard) if full else shards), tail.saved(full=full)
        self._failed = False

    def _check_writable(self) -> None:
        if self._lock is None:
            raise StoreError(
                f"the log at {self.path} is not open for writing: ScoreLog.resume(path, after=STEP)"
            )
        if not self._lock.held:
            raise StoreError(
                f"the log at {self.path} belongs to the process that this one was forked from"
            )
        self._lock.check_place()


def _truncated(root: Path, manifest: Manifest, shards: list[Shard], after: int) -> list[Shard]:
    """Drop the steps after one, from the end: whenever this is stopped, what is left is a log."""
    kept = list(shards)
    if shards and shards[-1].last > after:
        logger.warning(
            "the log at %s: the steps after %d, up to %d, are dropped; training makes them anew",
            root,
            after,
            shards[-1].last,
        )
    while kept and kept[-1].first > after:
        remove_shard(root, len(kept) - 1)
        kept.pop()
    if kept and kept[-1].last > after:
        unit = len(kept) - 1
        steps = read_shard(root, unit, checked=True)
        left = steps.first(int((steps.numbers <= after).sum()))
        kept[unit] = write_shard(root, manifest, unit, left, kept[unit].directions)
    return kept
