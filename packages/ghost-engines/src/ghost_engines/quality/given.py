"""The scores that are judged: any table of numbers by query and sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ghost_engines.dataset import ScoreTable
from ghost_engines.quality.errors import QualityError
from ghost_engines.search import RowScores

Scores = RowScores | ScoreTable | Tensor | np.ndarray
"""What `ghost_engines.search.scores` or `score_dataset` returned, or numbers `[Q, N]`."""


def as_scores(scores: Scores, ids: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and the ids of the samples.

    Args:
        scores: Scores: the higher, the more the sample lowers the query's loss.
        ids: Ids of N samples, where the scores do not have any; by default they are counted from 0.

    Returns:
        Scores, float64 `[Q, N]`, and ids, int64 `[N]`.

    Raises:
        QualityError: If there is not one finite number for each query and sample, or an id is there
            twice.
    """
    known: Any = None
    if isinstance(scores, RowScores):
        found, known = _array(scores.scores), scores.ids
    elif isinstance(scores, ScoreTable):
        found, known = scores.scores.T, scores.ids
    else:
        found = _array(scores)
    if found.ndim != 2 or found.dtype.kind != "f" or 0 in found.shape:
        raise QualityError(
            f"scores must be floating [Q, N], a row for each query, not {found.dtype} of shape "
            f"{list(found.shape)}"
        )
    if known is not None and ids is not None:
        raise QualityError(f"a {type(scores).__name__} has ids of its own: leave ids out")
    if not np.isfinite(found).all():
        raise QualityError(f"{int((~np.isfinite(found)).sum())} scores are not finite")
    return found.astype(np.float64), _as_ids(ids if known is None else known, found.shape[1])


def as_count(name: str, share: Any, n: int) -> int:
    """Return how many of n samples a share of them is.

    Raises:
        QualityError: If the share is no finite number.
    """
    real = isinstance(share, int | float | np.integer | np.floating)
    if isinstance(share, bool) or not real or not np.isfinite(share):
        raise QualityError(
            f"{name} must be a number above 0 and below 1, not {share!r}",
            remedy=f"say which part of the {n} samples, such as 0.5",
        )
    return round(float(share) * n)


def _array(values: object) -> np.ndarray:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().double().numpy())
    if isinstance(values, np.ndarray):
        return values
    raise QualityError(
        f"scores must be a tensor or an array [Q, N], or a table of scores, not a "
        f"{type(values).__name__}"
    )


def _as_ids(ids: Any, n: int) -> np.ndarray:
    found = np.arange(n) if ids is None else np.asarray(ids)
    if found.shape != (n,) or found.dtype.kind not in "iu":
        raise QualityError(
            f"ids must be {n} integers, one for each sample, not {found.dtype} of shape "
            f"{list(found.shape)}"
        )
    if len(np.unique(found)) < n:
        raise QualityError(
            "a sample has scores more than once",
            reason="a sample is in the training data, or it is not",
            remedy="give each sample an id of its own, with ids=...",
        )
    return found.astype(np.int64)
