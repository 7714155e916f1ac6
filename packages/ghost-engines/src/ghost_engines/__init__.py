"""Engines that use per-sample gradients: dot products, norms, projections; a store, its search."""

from importlib import import_module

TYPE_CHECKING = False  # of `typing`, which may lie in the working directory while __main__ starts
if TYPE_CHECKING:
    from ghost_engines.blocks import Block
    from ghost_engines.corpus import CorpusError, TokenCorpus, TokenMemmap, TokenWriter
    from ghost_engines.cosine import CosineEngine, Cosines
    from ghost_engines.dataset import (
        PerSampleLoss,
        ProjectedData,
        ScoreTable,
        project_dataset,
        score_dataset,
    )
    from ghost_engines.digest import model_digest
    from ghost_engines.directions import (
        FactoredDirection,
        adam_aware,
        load_direction,
        save_direction,
        second_order,
        unit_norm,
    )
    from ghost_engines.dot_product import DotProductEngine
    from ghost_engines.gram import Between, Gram, GramEngine
    from ghost_engines.holding import HoldingEngine
    from ghost_engines.ids import IdCollator, WithId, take_ids, with_ids
    from ghost_engines.log import JoinedLog, ScoreLog
    from ghost_engines.norms import NormEngine, Norms
    from ghost_engines.projected import ProjectedRows
    from ghost_engines.projection import ProjectionEngine
    from ghost_engines.queries import project_queries
    from ghost_engines.results import Result, SummedResult
    from ghost_engines.runs import Run, RunConfig
    from ghost_engines.scores import Scores, SegmentScores
    from ghost_engines.scoring import ScoreObserver, ScoringEngine
    from ghost_engines.selection import CandidateScores, Chosen, Greedy, Random, Threshold, TopK
    from ghost_engines.store import DamagedStoreError, GradientStore, Neighbours, StoreError
    from ghost_engines.values import (
        CreditedStep,
        GroupValues,
        History,
        InRunValues,
        ValueTable,
    )
    from ghost_engines.weighing import LossWeights

__all__ = [
    "Between",
    "Block",
    "CandidateScores",
    "Chosen",
    "CorpusError",
    "CosineEngine",
    "Cosines",
    "CreditedStep",
    "DamagedStoreError",
    "DotProductEngine",
    "FactoredDirection",
    "GradientStore",
    "Gram",
    "GramEngine",
    "Greedy",
    "GroupValues",
    "History",
    "HoldingEngine",
    "IdCollator",
    "InRunValues",
    "JoinedLog",
    "LossWeights",
    "Neighbours",
    "NormEngine",
    "Norms",
    "PerSampleLoss",
    "ProjectedData",
    "ProjectedRows",
    "ProjectionEngine",
    "Random",
    "Result",
    "Run",
    "RunConfig",
    "ScoreLog",
    "ScoreObserver",
    "ScoreTable",
    "Scores",
    "ScoringEngine",
    "SegmentScores",
    "StoreError",
    "SummedResult",
    "Threshold",
    "TokenCorpus",
    "TokenMemmap",
    "TokenWriter",
    "TopK",
    "ValueTable",
    "WithId",
    "adam_aware",
    "load_direction",
    "model_digest",
    "project_dataset",
    "project_queries",
    "save_direction",
    "score_dataset",
    "second_order",
    "take_ids",
    "unit_norm",
    "with_ids",
]

_ROOMS = (
    "blocks", "corpus", "cosine", "dataset", "digest", "directions", "dot_product", "gram",
    "holding", "ids", "log", "norms", "projected", "projection", "queries", "results", "runs",
    "scores", "scoring", "selection", "store", "values", "weighing",
)  # fmt: skip
"""The modules that the names above come from."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is asked for (PEP 562).

        The command `ghost` lives in this package, and its help should not wait for torch.
        """
        if name in __all__:
            for room in _ROOMS:
                module = import_module(f"{__name__}.{room}")
                if hasattr(module, name):
                    return globals().setdefault(name, getattr(module, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
