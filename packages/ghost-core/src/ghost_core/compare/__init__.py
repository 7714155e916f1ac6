"""Ghost's numbers against one autograd call per sample."""

from ghost_core.compare.comparison import check_losses, choose_samples, compare
from ghost_core.compare.report import ParameterCheck, Verification

__all__ = [
    "ParameterCheck",
    "Verification",
    "check_losses",
    "choose_samples",
    "compare",
]
