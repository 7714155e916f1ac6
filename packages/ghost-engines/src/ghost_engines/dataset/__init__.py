"""Scores a whole data set against targets, or projects it into a store, in one pass."""

from ghost_engines.dataset.collating import IGNORED, collated
from ghost_engines.dataset.losses import PerSampleLoss
from ghost_engines.dataset.packing import packed
from ghost_engines.dataset.project import ProjectedData, project_dataset
from ghost_engines.dataset.score import score_dataset
from ghost_engines.dataset.table import ScoreTable

__all__ = [
    "IGNORED",
    "PerSampleLoss",
    "ProjectedData",
    "ScoreTable",
    "collated",
    "packed",
    "project_dataset",
    "score_dataset",
]
