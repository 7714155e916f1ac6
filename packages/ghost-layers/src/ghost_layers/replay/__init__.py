"""Samplers that run a module's recorded call again."""

from ghost_layers.replay.linear_maps import LinearMap, WrittenOut
from ghost_layers.replay.module_copy import why_not_copied
from ghost_layers.replay.plan import Formula, Plan, Way
from ghost_layers.replay.prove import Search
from ghost_layers.replay.recording import InputRows
from ghost_layers.replay.sampler import GenericSampler, ReplaySampler

__all__ = [
    "Formula",
    "GenericSampler",
    "InputRows",
    "LinearMap",
    "Plan",
    "ReplaySampler",
    "Search",
    "Way",
    "WrittenOut",
    "why_not_copied",
]
