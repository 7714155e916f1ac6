"""Engines that use per-sample gradients: dot products, projections, a store and its search."""

from ghost_engines.digest import model_digest
from ghost_engines.dot_product import DotProductEngine
from ghost_engines.in_run import InRunValues
from ghost_engines.layout import Block
from ghost_engines.projection import ProjectedRows, ProjectionEngine
from ghost_engines.scores import ScoredBatch, Scores, SegmentScores
from ghost_engines.store import DamagedStoreError, GradientStore, Neighbours, StoreError

__all__ = [
    "Block",
    "DamagedStoreError",
    "DotProductEngine",
    "GradientStore",
    "InRunValues",
    "Neighbours",
    "ProjectedRows",
    "ProjectionEngine",
    "ScoredBatch",
    "Scores",
    "SegmentScores",
    "StoreError",
    "model_digest",
]
