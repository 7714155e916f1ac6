"""Chooses which candidates of a batch to train on, before the step."""

from ghost_engines.selection.candidates import Candidates, Losses
from ghost_engines.selection.policies import Greedy, Random, Threshold, TopK
from ghost_engines.selection.result import CandidateScores, Chosen, as_policy, choose_unscored

__all__ = [
    "CandidateScores",
    "Candidates",
    "Chosen",
    "Greedy",
    "Losses",
    "Random",
    "Threshold",
    "TopK",
    "as_policy",
    "choose_unscored",
]
