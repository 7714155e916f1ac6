"""Values on disk, step by step, for runs that outlive a process."""

from ghost_engines.log.log import ScoreLog
from ghost_engines.log.manifest import has_log

__all__ = ["ScoreLog", "has_log"]
