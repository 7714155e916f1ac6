"""The command `ghost`."""

from ghost_engines.cli.commands import main
from ghost_engines.cli.options import COMMANDS
from ghost_engines.cli.tables import stop_printing

__all__ = ["COMMANDS", "main", "stop_printing"]
