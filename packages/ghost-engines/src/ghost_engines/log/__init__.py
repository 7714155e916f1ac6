"""Values on disk, step by step, for runs that outlive a process."""

from ghost_engines.log.log import ScoreLog
from ghost_engines.log.totals import LogTable

__all__ = ["LogTable", "ScoreLog"]
