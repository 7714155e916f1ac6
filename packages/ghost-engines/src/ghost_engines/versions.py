"""Versions of installed distributions."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache  # each store that is made asks, and a version is read from a file
def version(distribution: str) -> str:
    """Return the installed version of a distribution, or `unknown` if it runs from its source."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
