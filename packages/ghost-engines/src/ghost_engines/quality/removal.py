"""What happens if the samples with the highest scores are left out, and if random ones are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ghost_core.arguments import whole
from ghost_engines.plots import curves, save
from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.given import Scores, as_count, as_scores
from ghost_engines.quality.jobs import Workplace
from ghost_engines.quality.retraining import Train, Training, retrain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True, repr=False)
class RemovalCurve:
    """Mean losses of the queries after training without some samples.

    Attributes:
        shares: Which shares of the samples were left out, `[S]`.
        whole: With all samples, float64 `[seeds]`.
        by_score: Without those with the highest scores, float64 `[S, seeds]`.
        at_random: Without as many others, drawn anew for each seed, float64 `[S, seeds]`.
    """

    shares: np.ndarray
    whole: np.ndarray
    by_score: np.ndarray
    at_random: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """How much higher losses are by score than at random, `[S]`."""
        gap: np.ndarray = self.by_score.mean(1) - self.at_random.mean(1)
        return gap

    def __repr__(self) -> str:
        """Say how much higher losses are by score than at random."""
        parts = [f"{s:.0%}: {g:+.3g}" for s, g in zip(self.shares, self.gap, strict=True)]
        return f"RemovalCurve({', '.join(parts)} above random)"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the losses over the shares.

        Args:
            path: File to write to: .png, .svg or .pdf.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            UnknownNameError: If the kind of file is unknown.
            OSError: If it cannot be written.
        """
        places = np.concatenate([[0], 100 * self.shares])
        lines = {
            "highest scores": np.concatenate([self.whole[None], self.by_score]),
            "at random": np.concatenate([self.whole[None], self.at_random]),
        }
        figure = curves(places, lines, "samples left out (%)", "mean loss of the queries")
        return save(figure, path)


def removal_curve(
    scores: Scores,
    train: Train,
    *,
    ids: Any = None,
    shares: Sequence[float] = SHARES,
    seeds: int = 3,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: bool | None = None,
) -> RemovalCurve:
    """Train without the samples that have the highest scores, and without random ones.

    The scores of a sample are added up over queries. If they are right, losses rise faster without
    the highest ones. To see whether the lowest ones harm, give `-scores`: losses should fall then.

    Args:
        scores: Scores `[Q, N]`, higher for samples that lower the query's loss.
        train: As for `lds`.
        ids: Ids of the N samples, where the scores have none; by default they are counted from 0.
        shares: Which shares to leave out, each above 0 and below 1.
        seeds: How many times to train for each, and with how many draws of random samples.
        seed: The first seed of draws and trainings.
        folder: Where to keep each training that is done, so that a second call goes on.
        processes: How many trainings run at once.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Raises:
        QualityError: If scores or ids do not fit, a number is out of range, or `train` fails,
            returns something else or cannot be sent to other processes. What is done is kept.
        OSError: If something cannot be kept.
    """
    table, known = as_scores(scores, ids)
    seeds = whole("seeds", seeds, least=1, error=QualityError)
    seed = whole("seed", seed, least=0, error=QualityError)
    if isinstance(shares, str) or not isinstance(shares, Sequence | np.ndarray):
        raise QualityError(f"shares must be a list of numbers, such as [0.1, 0.3], not {shares!r}")
    counts = [as_count("each of shares", share, len(known)) for share in shares]
    if not counts or not all(0 < count < len(known) for count in counts):
        raise QualityError(
            f"shares={list(shares)} of {len(known)} samples are {counts}: each must leave some "
            "out, and keep some"
        )
    # Of equal scores the first sample goes first.
    order = np.argsort(-table.sum(0), kind="stable")
    runs = range(seed, seed + seeds)
    drawn = [np.random.default_rng(run).permutation(len(known)) for run in runs]
    jobs = [Training(np.sort(known), run) for run in runs]
    jobs += [Training(np.sort(known[order[count:]]), run) for count in counts for run in runs]
    jobs += [
        Training(np.sort(known[rows[count:]]), run)
        for count in counts
        for run, rows in zip(runs, drawn, strict=True)
    ]
    found = retrain(train, jobs, len(table), Workplace(folder, processes, progress)).mean(1)
    whole_, *parts = found.reshape(-1, seeds)
    by_score, at_random = np.stack(parts).reshape(2, len(counts), seeds)
    return RemovalCurve(np.array(shares, dtype=np.float64), whole_, by_score, at_random)
