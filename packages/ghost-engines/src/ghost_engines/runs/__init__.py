"""One object for a training loop, whatever is measured in it."""

from ghost_engines.runs.checkpoint import read_state, write_state
from ghost_engines.runs.config import RunConfig
from ghost_engines.runs.engines import GivenDirections
from ghost_engines.runs.folder import RunExistsError
from ghost_engines.runs.run import Run

__all__ = ["GivenDirections", "Run", "RunConfig", "RunExistsError", "read_state", "write_state"]
