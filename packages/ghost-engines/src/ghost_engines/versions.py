"""Versions of installed distributions."""

from __future__ import annotations

from importlib import metadata


def version(distribution: str) -> str:
    """Return the installed version of a distribution, or `unknown` if it runs from its source."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
