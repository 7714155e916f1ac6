"""Engines that use per-sample gradients: dot products, norms, projections; a store, its search."""

from ghost_engines.blocks import Block
from ghost_engines.cosine import CosineEngine, Cosines
from ghost_engines.digest import model_digest
from ghost_engines.dot_product import DotProductEngine
from ghost_engines.gram import Between, Gram, GramEngine
from ghost_engines.holding import HoldingEngine, LossWeights
from ghost_engines.in_run import InRunValues
from ghost_engines.norms import NormEngine, Norms
from ghost_engines.projection import ProjectedRows, ProjectionEngine
from ghost_engines.results import Result, SummedResult
from ghost_engines.scores import Scores, SegmentScores
from ghost_engines.scoring import ScoreObserver, ScoringEngine
from ghost_engines.store import DamagedStoreError, GradientStore, Neighbours, StoreError

__all__ = [
    "Between",
    "Block",
    "CosineEngine",
    "Cosines",
    "DamagedStoreError",
    "DotProductEngine",
    "GradientStore",
    "Gram",
    "GramEngine",
    "HoldingEngine",
    "InRunValues",
    "LossWeights",
    "Neighbours",
    "NormEngine",
    "Norms",
    "ProjectedRows",
    "ProjectionEngine",
    "Result",
    "ScoreObserver",
    "Scores",
    "ScoringEngine",
    "SegmentScores",
    "StoreError",
    "SummedResult",
    "model_digest",
]
