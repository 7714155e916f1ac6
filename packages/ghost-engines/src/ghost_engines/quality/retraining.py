"""Trains a model again and again on parts of its data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.identity import identity
from ghost_engines.quality.jobs import Work, Workplace, do_all

Train = Callable[[np.ndarray, int], Any]
"""Trains a model on the samples with these ids, int64 `[n]`, from this seed, and returns the loss
of each query, `[Q]`. For several processes it must be picklable: a function of a module that can be
imported, or an object of such a class."""


@dataclass(frozen=True)
class Training:
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

    @property
    def called(self) -> str:
        """What it is, for errors."""
        return f"train on {len(self.ids)} samples from seed {self.seed}"

    @property
    def about(self) -> dict[str, Any]:
        """What its file says besides the losses."""
        return {"seed": self.seed, "samples": len(self.ids)}


def retrain(
    train: Train, trainings: Sequence[Training], queries: int, place: Workplace
) -> np.ndarray:
    """Train on each of several parts of the data.

    Args:
        train: Trains a model.
        trainings: What to train on.
        queries: How many losses each training must return.
        place: Where.

    Returns:
        Losses, float64 `[trainings, Q]`.

    Raises:
        QualityError: If `train` cannot be sent to other processes, or told from others in a folder,
            fails, or returns something else; or the folder belongs to another one. What is done
            stays in the folder.
        OSError: If something cannot be kept.
    """
    if not callable(train):
        raise QualityError(f"train must be a function of ids and a seed, not {train!r}")
    work = Work[Training](
        do=partial(_trained, train, queries),
        size=queries,
        what="train",
        whose=lambda: identity(train, "train"),
        title="training",
        unit="run",
    )
    return do_all(work, trainings, place)


def _trained(train: Train, queries: int, training: Training) -> np.ndarray:
    """Train once and return the losses, float64 `[Q]`."""
    returned = train(training.ids.copy(), training.seed)
    if isinstance(returned, torch.Tensor):
        returned = returned.detach().cpu().double().numpy()
    losses = np.asarray(returned)
    if losses.shape != (queries,) or losses.dtype.kind not in "fiu":
        raise QualityError(
            f"{training.called} returned {losses.dtype} of shape {list(losses.shape)}: needed is "
            f"the loss of each of {queries} queries, [{queries}]"
        )
    if not np.isfinite(losses).all():
        raise QualityError(f"{training.called} returned losses that are not finite")
    return losses.astype(np.float64)
