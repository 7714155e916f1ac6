"""Which parameters are tracked, under which names, by which sampler."""

from ghost_core.tracking.registry import Claim, SamplerRegistry, dotted_name
from ghost_core.tracking.tracking import (
    Patterns,
    Selection,
    Site,
    TrackedModule,
    Tracking,
    as_patterns,
    owner_of,
    parameter_of,
    track,
)

__all__ = [
    "Claim",
    "Patterns",
    "SamplerRegistry",
    "Selection",
    "Site",
    "TrackedModule",
    "Tracking",
    "as_patterns",
    "dotted_name",
    "owner_of",
    "parameter_of",
    "track",
]
