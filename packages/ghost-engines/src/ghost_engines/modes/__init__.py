"""How the dot product engine computes: what autograd makes, what ghost makes, what is summed."""

from ghost_engines.modes.concatenation import Concatenation, InBatch, check_tracked
from ghost_engines.modes.joining import Padding
from ghost_engines.modes.mode import Mode, as_mode
from ghost_engines.modes.small import SmallOnes
from ghost_engines.modes.terms import Terms
from ghost_engines.modes.together import Together

__all__ = [
    "Concatenation",
    "InBatch",
    "Mode",
    "Padding",
    "SmallOnes",
    "Terms",
    "Together",
    "as_mode",
    "check_tracked",
]
