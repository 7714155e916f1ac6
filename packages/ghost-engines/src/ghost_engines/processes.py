"""How many processes work together, and which one this is, as far as torch was told."""

from __future__ import annotations

from torch import distributed


def process_count() -> int:
    """Return how many processes torch's default group has: 1 if there is no group."""
    return distributed.get_world_size() if _grouped() else 1


def process_rank() -> int:
    """Return the number of this process in torch's default group: 0 if there is no group."""
    return distributed.get_rank() if _grouped() else 0


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
