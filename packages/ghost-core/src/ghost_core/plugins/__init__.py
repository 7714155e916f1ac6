"""What plugins may offer, and those that are installed."""

from ghost_core.plugins.disabled import DISABLED_VARIABLE
from ghost_core.plugins.discovery import Contributions, collect, installed, select
from ghost_core.plugins.hookspecs import Command, Override, hookimpl
from ghost_core.plugins.offers import Plugin, plural

__all__ = [
    "DISABLED_VARIABLE",
    "Command",
    "Contributions",
    "Override",
    "Plugin",
    "collect",
    "hookimpl",
    "installed",
    "plural",
    "select",
]
