"""Values on disk, step by step, for runs that outlive a process."""

from ghost_engines.log.joined import LOG, RANK, JoinedLog, open_log
from ghost_engines.log.log import ScoreLog
from ghost_engines.log.manifest import has_log

__all__ = ["LOG", "RANK", "JoinedLog", "ScoreLog", "has_log", "open_log"]
