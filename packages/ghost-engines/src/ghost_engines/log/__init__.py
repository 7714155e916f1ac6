"""Values on disk, step by step, for runs that outlive a process."""

from ghost_engines.log.log import ScoreLog

__all__ = ["ScoreLog"]
