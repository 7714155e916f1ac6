"""Errors of the command itself."""

from __future__ import annotations

from ghost_core import GhostError


class CommandError(GhostError):
    """What the command was given cannot be used."""
