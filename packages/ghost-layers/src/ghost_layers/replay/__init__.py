"""Samplers that run a module's recorded call again."""

from ghost_layers.replay.plan import Forward, Plan, Way, floating
from ghost_layers.replay.prove import Search
from ghost_layers.replay.recording import InputRows
from ghost_layers.replay.sampler import GenericSampler, ReplaySampler, kept

__all__ = [
    "Forward",
    "GenericSampler",
    "InputRows",
    "Plan",
    "ReplaySampler",
    "Search",
    "Way",
    "floating",
    "kept",
]
