"""How many processes work together, as far as torch was told."""

from __future__ import annotations

from torch import distributed


def process_count() -> int:
    """Return how many processes torch's default group has: 1 if there is no group."""
    known = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if known else 1
