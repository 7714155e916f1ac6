"""Chooses which candidates of a batch to train on, before the step."""

from ghost_engines.selection.candidates import Candidates, Losses
from ghost_engines.selection.policies import Greedy, Threshold, TopK
from ghost_engines.selection.result import CandidateScores, Chosen

__all__ = ["CandidateScores", "Candidates", "Chosen", "Greedy", "Losses", "Threshold", "TopK"]
