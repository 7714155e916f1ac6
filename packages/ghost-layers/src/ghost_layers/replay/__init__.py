"""Samplers that run a module's recorded call again."""

from ghost_layers.replay.before import RefusalError
from ghost_layers.replay.plan import Forward, Leaf, Plan, Way, floating
from ghost_layers.replay.prove import Search
from ghost_layers.replay.sampler import GenericSampler, ReplaySampler, kept

__all__ = [
    "Forward",
    "GenericSampler",
    "Leaf",
    "Plan",
    "RefusalError",
    "ReplaySampler",
    "Search",
    "Way",
    "floating",
    "kept",
]
