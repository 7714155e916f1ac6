"""Does many jobs of one kind, in several processes, and keeps what each ended with."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from ghost_core import GhostError
from ghost_core.arguments import whole
from ghost_core.errors import told
from ghost_engines.progress import Progress
from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.identity import pickled
from ghost_engines.quality.kept import Kept


class Job(Protocol):
    """One of many."""

    @property
    def name(self) -> str:
        """What tells it from other jobs; its file has this name."""

    @property
    def called(self) -> str:
        """What it is, for errors."""

    @property
    def about(self) -> dict[str, Any]:
        """What its file says besides what it ended with."""


JobT = TypeVar("JobT", bound=Job)


@dataclass(frozen=True)
class Work(Generic[JobT]):
    """What is done in each job.

    Attributes:
        do: Returns what a job ended with, float64 `[size]`. Is sent to other processes.
        size: How many numbers that are.
        what: What of it the user gave, for errors.
        whose: Returns what a folder says of the work: a folder belongs to one.
        title: What a progress bar says.
        unit: What it counts.
    """

    do: Callable[[JobT], np.ndarray]
    size: int
    what: str
    whose: Callable[[], dict[str, str]]
    title: str
    unit: str


@dataclass(frozen=True)
class Workplace:
    """Where jobs are done, and where their ends are kept.

    Attributes:
        folder: Where to keep the end of each job, and to look for those that are done; None for
            nowhere. A folder belongs to one work, of which a file in it has the name and a digest.
        processes: How many jobs are done at once; 1 does them here.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.
    """

    folder: str | os.PathLike[str] | None
    processes: int
    progress: bool | None


def do_all(work: Work[JobT], jobs: Sequence[JobT], place: Workplace) -> np.ndarray:
    """Do all jobs that are not done yet.

    Args:
        work: What to do.
        jobs: On what.
        place: Where.

    Returns:
        What they ended with, float64 `[jobs, size]`.

    Raises:
        QualityError: If the work cannot be sent to other processes, or told from others in a
            folder, or fails; or the folder belongs to another one. What is done stays in the
            folder.
        OSError: If something cannot be kept.
    """
    processes = whole("processes", place.processes, least=1, error=QualityError)
    done: dict[str, np.ndarray] = {}
    kept = None
    if place.folder is not None:
        kept = Kept.opened(Path(place.folder).absolute(), work.whose(), work.size)
        done = {job.name: end for job in jobs if (end := kept.read(job.name)) is not None}
    left = {job.name: job for job in jobs if job.name not in done}
    ends = _done_here if processes == 1 or not left else _done_elsewhere
    with Progress(len(jobs), work.title, place.progress, unit=work.unit) as bar:
        bar.advance(len(jobs) - len(left))
        for job, end in ends(work, list(left.values()), processes):
            if kept is not None:
                kept.write(job.name, job.about, end)
            done[job.name] = end
            bar.advance(1)
    return np.stack([done[job.name] for job in jobs])


def _done_here(
    work: Work[JobT], jobs: Sequence[JobT], processes: int
) -> Iterator[tuple[JobT, np.ndarray]]:
    for job in jobs:
        yield job, _end(work.do, job)


def _done_elsewhere(
    work: Work[JobT], jobs: Sequence[JobT], processes: int
) -> Iterator[tuple[JobT, np.ndarray]]:
    """Yield jobs as other processes end them.

    All is sent as bytes: what torch would send in place of them keeps the caller's tensors in
    shared memory, and a file open for each.
    """
    sent = pickled(work.do, work.what)
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    count = min(processes, len(jobs))
    with ProcessPoolExecutor(count, context, initializer=_start, initargs=(threads, sent)) as pool:
        try:
            futures = {pool.submit(_end_there, pickled(job, job.called)): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise QualityError(
                "a process that works has died",
                reason=f"{work.what} ended it, memory ran out, or it could not start: the main "
                "module is imported anew in each",
                remedy="run with processes=1 or fewer processes, and start a script's work under "
                'if __name__ == "__main__"',
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end(do: Callable[[JobT], np.ndarray], job: JobT) -> np.ndarray:
    """Do a job; what it raises becomes an error that says in which one."""
    try:
        return do(job)
    except GhostError:
        raise
    except Exception as error:
        raise QualityError(f"{job.called} raised {told(error)}") from error


# In the other processes


_do: Callable[[Any], np.ndarray]
"""What this process does with each job."""


def _start(threads: int, sent: bytes) -> None:
    global _do  # a process of a pool has no other place for what all jobs share
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _do = pickle.loads(sent)


def _end_there(sent: bytes) -> np.ndarray:
    return _end(_do, pickle.loads(sent))


def _end_with_parent() -> None:
    """End this process once that is gone which asked for it, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
