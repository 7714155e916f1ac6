"""What plugins may offer, and those that are installed."""

from ghost_core.plugins.discovery import (
    DISABLED_VARIABLE,
    Contributions,
    Plugin,
    collect,
    installed,
    select,
)
from ghost_core.plugins.hookspecs import hookimpl

__all__ = [
    "DISABLED_VARIABLE",
    "Contributions",
    "Plugin",
    "collect",
    "hookimpl",
    "installed",
    "select",
]
