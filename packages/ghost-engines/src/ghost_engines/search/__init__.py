"""What is asked of stores beyond their nearest rows: whitened, of several, by group, duplicates."""

from ghost_engines.search.approximate import ApproximateIndex
from ghost_engines.search.duplicates import Pairs, near_duplicates
from ghost_engines.search.groups import GroupScores, group_scores
from ghost_engines.search.parts import score_parts
from ghost_engines.search.together import RowScores, scores, search
from ghost_engines.search.whitening import Whitening

__all__ = [
    "ApproximateIndex",
    "GroupScores",
    "Pairs",
    "RowScores",
    "Whitening",
    "group_scores",
    "near_duplicates",
    "score_parts",
    "scores",
    "search",
]
