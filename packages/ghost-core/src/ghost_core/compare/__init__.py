"""Ghost's numbers against one autograd call per sample."""

from ghost_core.compare.comparison import choose_samples, compare
from ghost_core.compare.computation import check_losses
from ghost_core.compare.report import Comparison, ParameterCheck

__all__ = ["Comparison", "ParameterCheck", "check_losses", "choose_samples", "compare"]
