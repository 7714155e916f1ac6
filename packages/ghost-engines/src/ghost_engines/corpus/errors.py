"""What can go wrong with a corpus."""

from __future__ import annotations

from ghost_core import GhostError


class CorpusError(GhostError, ValueError):
    """Files of a corpus are missing, malformed, or do not go together."""


def position(index: int, count: int, there: str, *, backwards: bool = False) -> int:
    """Return which of several things a number stands for.

    Args:
        index: The number, from 0.
        count: How many there are.
        there: That there are so many, for the error: "there are 3 samples".
        backwards: Whether negative numbers count from the end.

    Raises:
        IndexError: If there is none with that number.
    """
    at = int(index) + (count if backwards and index < 0 else 0)
    if not 0 <= at < count:
        raise IndexError(f"{there}, and none with number {index}")
    return at
