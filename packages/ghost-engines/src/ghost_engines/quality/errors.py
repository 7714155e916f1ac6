"""What can go wrong where scores are judged."""

from __future__ import annotations

from ghost_core import GhostError


class QualityError(GhostError):
    """Scores, or the function that trains a model again, cannot be used."""
