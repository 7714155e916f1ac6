"""The linear datamodeling score: do sums of scores tell what training on parts of the data does?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ghost_core.arguments import whole
from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.given import Scores, as_count, as_scores
from ghost_engines.quality.jobs import Workplace
from ghost_engines.quality.retraining import Train, Training, retrain


@dataclass(frozen=True, repr=False)
class LDS:
    """A linear datamodeling score.

    Attributes:
        by_query: Rank correlation for each query, float64 `[Q]`; NaN where all predictions or all
            losses are equal.
        predicted: Sums of the scores of each subset, float64 `[subsets, Q]`.
        losses: Losses of each query after training on each subset, float64 `[subsets, Q]`: the mean
            over seeds.
    """

    by_query: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over queries that have a correlation; NaN if none has."""
        known = self.by_query[np.isfinite(self.by_query)]
        return float(known.mean()) if len(known) else float("nan")

    @property
    def error(self) -> float:
        """Standard error of the mean over queries."""
        known = self.by_query[np.isfinite(self.by_query)]
        return float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")

    def __repr__(self) -> str:
        """Say how high it is, or why there is none."""
        subsets, queries = self.losses.shape
        if not np.isfinite(self.by_query).any():
            return (
                f"LDS(none: all predictions or all losses of a query are equal, {subsets} subsets, "
                f"Q={queries})"
            )
        return f"LDS({self.mean:.3f} ± {self.error:.3f}, {subsets} subsets, Q={queries})"


def lds(
    scores: Scores,
    train: Train,
    *,
    ids: Any = None,
    subsets: int = 100,
    share: float = 0.5,
    seeds: int = 1,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: bool | None = None,
) -> LDS:
    """Train on random subsets, and compare losses with the sums of the subsets' scores.

    For each query it is the rank correlation, over subsets, of the sum of the scores of the samples
    in a subset with minus the query's loss after training on them (Park et al., 2023, section 2).
    1 means that scores order subsets as training does.

    Args:
        scores: Scores `[Q, N]`, higher for samples that lower the query's loss.
        train: Takes ids of samples, int64 `[n]`, and a seed, and returns the loss of each query,
            `[Q]`. Must be picklable for several processes.
        ids: Ids of the N samples, where the scores have none; by default they are counted from 0.
        subsets: How many subsets to train on.
        share: Which share of the samples a subset has.
        seeds: How many times to train on each; the mean of the losses is less noisy.
        seed: Seed of the subsets, and the first seed of the trainings.
        folder: Where to keep each training that is done, so that a second call goes on. It belongs
            to one function with its arguments, told apart by its pickle; scores may differ.
        processes: How many trainings run at once.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Raises:
        QualityError: If scores or ids do not fit, a number is out of range, or `train` fails,
            returns something else or cannot be sent to other processes. What is done is kept.
        OSError: If something cannot be kept.
    """
    table, known = as_scores(scores, ids)
    subsets = whole("subsets", subsets, least=3, error=QualityError)
    seeds = whole("seeds", seeds, least=1, error=QualityError)
    size = as_count("share", share, len(known))
    if not 0 < size < len(known):
        raise QualityError(
            f"share={share} of {len(known)} samples is {size}: some must be in a subset, not all"
        )
    draw = np.random.default_rng(whole("seed", seed, least=0, error=QualityError))
    chosen = [np.sort(draw.permutation(len(known))[:size]) for _ in range(subsets)]
    jobs = [Training(np.sort(known[rows]), seed + at) for rows in chosen for at in range(seeds)]
    losses = retrain(train, jobs, len(table), Workplace(folder, processes, progress))
    losses = losses.reshape(subsets, seeds, -1).mean(1)
    predicted = np.stack([table[:, rows].sum(1) for rows in chosen])
    pairs = zip(predicted.T, -losses.T, strict=True)
    return LDS(np.array([rank_correlation(*pair) for pair in pairs]), predicted, losses)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation; NaN if all of a or b are equal."""
    ranks = np.stack([_ranks(a), _ranks(b)])
    centred = ranks - ranks.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    return float(centred[0] @ centred[1] / norms.prod()) if norms.all() else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, equal ones shared."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    shared: np.ndarray = (ends - (counts - 1) / 2)[inverse]
    return shared
