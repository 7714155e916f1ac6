"""How good scores are: against what training again, or one more step, really does."""

from ghost_engines.quality.datamodeling import LDS, lds
from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.one_step import TailPatch, tail_patch
from ghost_engines.quality.removal import RemovalCurve, removal_curve
from ghost_engines.quality.retraining import Train

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
