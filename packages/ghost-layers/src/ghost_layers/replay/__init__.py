"""Samplers that run a module's recorded call again."""

from ghost_layers.replay.module_copy import why_not_copied
from ghost_layers.replay.plan import Forward, Plan, Replay, Way, floating
from ghost_layers.replay.prove import Search
from ghost_layers.replay.recording import InputRows
from ghost_layers.replay.sampler import GenericSampler, ReplaySampler

__all__ = [
    "Forward",
    "GenericSampler",
    "InputRows",
    "Plan",
    "Replay",
    "ReplaySampler",
    "Search",
    "Way",
    "floating",
    "why_not_copied",
]
