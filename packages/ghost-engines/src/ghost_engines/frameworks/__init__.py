"""Runs inside other libraries' training loops; each module needs what its library's extra installs.

Names are imported when they are asked for (PEP 562), so that one library does not need the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghost_engines.frameworks.callback import GhostCallback
    from ghost_engines.frameworks.lightning import GhostLightning
    from ghost_engines.frameworks.trainer import GhostMixin, GhostTrainer
    from ghost_engines.frameworks.trl import GhostDPOTrainer, GhostSFTTrainer

__all__ = [
    "GhostCallback",
    "GhostDPOTrainer",
    "GhostLightning",
    "GhostMixin",
    "GhostSFTTrainer",
    "GhostTrainer",
]

_MODULES = {
    "GhostCallback": "callback",
    "GhostDPOTrainer": "trl",
    "GhostLightning": "lightning",
    "GhostMixin": "trainer",
    "GhostSFTTrainer": "trl",
    "GhostTrainer": "trainer",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name with the module that it comes from.

        Raises:
            MissingExtraError: If the library is not installed.
            AttributeError: If there is no such name.
        """
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_MODULES[name]}")
        return globals().setdefault(name, getattr(module, name))
