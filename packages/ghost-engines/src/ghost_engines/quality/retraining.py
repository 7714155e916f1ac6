"""Trains a model again and again on parts of its data, in several processes, and keeps each end."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghost_core import GhostError
from ghost_core.arguments import whole
from ghost_core.errors import told
from ghost_engines.files import make_root, read_regular, remove_temporaries, write_json
from ghost_engines.progress import Progress
from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.identity import check_picklable, identity

Train = Callable[[np.ndarray, int], Any]
"""Trains a model on the samples with these ids, int64 `[n]`, from this seed, and returns the loss
of each query, `[Q]`. For several processes it must be picklable: a function of a module that can be
imported, or an object of such a class."""

_LONGEST = 1 << 28


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        ids: Ids of the samples to train on, int64 `[n]`, rising.
        seed: Seed of the training.
    """

    ids: np.ndarray
    seed: int

    @property
    def name(self) -> str:
        """What tells it from other trainings."""
        return hashlib.sha256(self.ids.tobytes() + f"/{self.seed}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Workplace:
    """Where trainings run, and where their ends are kept.

    Attributes:
        folder: Where to keep the end of each training, and to look for those that are done; None
            for nowhere. A folder belongs to one function with its arguments, of which a file in it
            has the name and a digest.
        processes: How many trainings run at once; 1 runs them here.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.
    """

    folder: str | os.PathLike[str] | None
    processes: int
    progress: bool | None


def retrain(train: Train, jobs: Sequence[Job], queries: int, place: Workplace) -> np.ndarray:
    """Train on each of several parts of the data.

    Args:
        train: Trains a model.
        jobs: What to train on.
        queries: How many losses each training must return.
        place: Where.

    Returns:
        Losses, float64 `[jobs, Q]`.

    Raises:
        QualityError: If `train` cannot be sent to other processes, or told from others in a folder,
            fails, or returns something else; or the folder belongs to another one. What is done
            stays in the folder.
        OSError: If something cannot be kept.
    """
    processes = whole("processes", place.processes, least=1, error=QualityError)
    if not callable(train):
        raise QualityError(f"train must be a function of ids and a seed, not {train!r}")
    done: dict[str, np.ndarray] = {}
    root = None if place.folder is None else _opened(Path(place.folder).absolute(), train)
    if root is not None:
        done = {job.name: kept for job in jobs if (kept := _kept(root, job, queries)) is not None}
    left = {job.name: job for job in jobs if job.name not in done}
    if processes > 1 and left:
        check_picklable(train)
    with Progress(len(jobs), "training", place.progress, unit="run") as bar:
        bar.advance(len(jobs) - len(left))
        for job, losses in _run(train, list(left.values()), queries, processes):
            if root is not None:
                _keep(root, job, losses)
            done[job.name] = losses
            bar.advance(1)
    return np.stack([done[job.name] for job in jobs])


def _run(
    train: Train, jobs: Sequence[Job], queries: int, processes: int
) -> Iterator[tuple[Job, np.ndarray]]:
    """Yield trainings as they end."""
    if processes == 1 or not jobs:
        for job in jobs:
            yield job, _trained(train, job, queries)
        return
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    with ProcessPoolExecutor(
        min(processes, len(jobs)), context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        try:
            futures = {pool.submit(_trained, train, job, queries): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise QualityError(
                "a process that trains has died",
                reason="train ended it, memory ran out, or it could not start: the main module is "
                "imported anew in each",
                remedy="run with processes=1 or fewer processes, and start a script's work under "
                'if __name__ == "__main__"',
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _trained(train: Train, job: Job, queries: int) -> np.ndarray:
    """Train once and return the losses, float64 `[Q]`."""
    what = f"train on {len(job.ids)} samples from seed {job.seed}"
    try:
        returned = train(job.ids.copy(), job.seed)
    except GhostError:
        raise
    except Exception as error:
        raise QualityError(f"{what} raised {told(error)}") from error
    if isinstance(returned, torch.Tensor):
        returned = returned.detach().cpu().double().numpy()
    losses = np.asarray(returned)
    if losses.shape != (queries,) or losses.dtype.kind not in "fiu":
        raise QualityError(
            f"{what} returned {losses.dtype} of shape {list(losses.shape)}: needed is the loss of "
            f"each of {queries} queries, [{queries}]"
        )
    if not np.isfinite(losses).all():
        raise QualityError(f"{what} returned losses that are not finite")
    return losses.astype(np.float64)


def _opened(root: Path, train: Train) -> Path:
    """Make a folder, or go on in it if it is of the same function."""
    make_root(root)
    remove_temporaries(root)
    path, now = root / "train.json", identity(train)
    if path.exists():
        _check_same(path, now)
    else:
        write_json(path, now, root, indent=None)
    return root


def _check_same(path: Path, now: dict[str, str]) -> None:
    """Refuse a folder of another function."""
    try:
        found = dict(json.loads(read_regular(path, _LONGEST)))
        name = found["train"]
    except (ValueError, KeyError, TypeError) as error:
        raise QualityError(
            f"{path} does not say whose trainings are in its folder",
            reason="it is damaged, or of something else",
            remedy="choose another folder",
        ) from error
    if name != now["train"]:
        raise QualityError(
            f"{path.parent} has trainings by {name}, not by {now['train']}",
            reason="what others returned cannot be compared",
            remedy="choose another folder for each function",
        )
    if found != now:
        raise QualityError(
            f"{path.parent} has trainings by {name} with other arguments or attributes",
            reason="they are compared by their pickle, in which the order of sets and dictionaries "
            "counts, and what a training changed in them",
            remedy="choose another folder for each function; if it is the same one, have "
            "__getstate__ return only what tells it apart, in a fixed order",
        )


def _kept(root: Path, job: Job, queries: int) -> np.ndarray | None:
    """Return the losses of a training that is done."""
    path = root / f"{job.name}.json"
    if not path.exists():
        return None
    try:
        losses = np.array(json.loads(read_regular(path, _LONGEST))["losses"], dtype=np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise QualityError(f"{path} does not hold a training: remove it") from error
    if losses.shape != (queries,):
        raise QualityError(
            f"{path} has {losses.size} losses for {queries} queries",
            reason="it is of other queries",
            remedy="choose another folder",
        )
    return losses


def _keep(root: Path, job: Job, losses: np.ndarray) -> None:
    content = {"seed": job.seed, "samples": len(job.ids), "losses": losses.tolist()}
    write_json(root / f"{job.name}.json", content, root, indent=None)
