"""Scores a whole data set against targets, in one pass."""

from ghost_engines.dataset.losses import PerSampleLoss
from ghost_engines.dataset.score import score_dataset
from ghost_engines.dataset.table import ScoreTable

__all__ = ["PerSampleLoss", "ScoreTable", "score_dataset"]
