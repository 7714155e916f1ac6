"""Which parameters are tracked, under which names, by which sampler."""

from ghost_core.tracking.blame import Blame
from ghost_core.tracking.patterns import Patterns, as_patterns, select_parameters
from ghost_core.tracking.registry import Claim, Found, Refused, SamplerRegistry, dotted_name
from ghost_core.tracking.shown import Followed, coverage
from ghost_core.tracking.tracking import (
    Selection,
    TrackedModule,
    TrackedParameter,
    Tracking,
    joined,
    owner_of,
    parameter_of,
    track,
)

__all__ = [
    "Blame",
    "Claim",
    "Followed",
    "Found",
    "Patterns",
    "Refused",
    "SamplerRegistry",
    "Selection",
    "TrackedModule",
    "TrackedParameter",
    "Tracking",
    "as_patterns",
    "coverage",
    "dotted_name",
    "joined",
    "owner_of",
    "parameter_of",
    "select_parameters",
    "track",
]
