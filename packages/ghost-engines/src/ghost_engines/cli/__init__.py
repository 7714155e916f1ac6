"""The command `ghost`."""

from ghost_engines.cli.commands import main
from ghost_engines.cli.options import COMMANDS

__all__ = ["COMMANDS", "main"]
