"""One object for a training loop, whatever is measured in it."""

from ghost_engines.runs.config import RunConfig
from ghost_engines.runs.run import Run

__all__ = ["Run", "RunConfig"]
