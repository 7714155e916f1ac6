"""How good scores are: against what training again, or one more step, really does."""

from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.lds import LDS, lds
from ghost_engines.quality.removal import RemovalCurve, removal_curve
from ghost_engines.quality.retraining import Train
from ghost_engines.quality.tail_patch import TailPatch, tail_patch

__all__ = [
    "LDS",
    "QualityError",
    "RemovalCurve",
    "TailPatch",
    "Train",
    "lds",
    "removal_curve",
    "tail_patch",
]
