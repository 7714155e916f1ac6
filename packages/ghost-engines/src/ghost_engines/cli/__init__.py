"""The command `ghost`."""

from ghost_engines.cli.commands import main

__all__ = ["main"]
