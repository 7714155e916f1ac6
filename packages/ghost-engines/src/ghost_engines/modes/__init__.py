"""How the dot product engine computes: what autograd makes, what ghost makes, what is summed."""

from ghost_engines.modes.mode import Mode, as_mode
from ghost_engines.modes.norm_sums import NormSums

__all__ = ["Mode", "NormSums", "as_mode"]
