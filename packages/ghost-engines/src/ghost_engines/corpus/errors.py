"""What can go wrong with a corpus."""

from __future__ import annotations

from ghost_core import GhostError


class CorpusError(GhostError, ValueError):
    """Files of a corpus are missing, malformed, or do not go together."""
