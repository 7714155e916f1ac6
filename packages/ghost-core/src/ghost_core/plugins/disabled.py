"""What the environment switches off: distributions, plugins of theirs, or single offers."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field

from ghost_core.errors import UnknownNameError

logger = logging.getLogger(__name__)

DISABLED_VARIABLE = "GHOST_DISABLED_PLUGINS"
"""Environment variable: what is switched off, separated by commas.

A distribution (`ghost-layers`), one plugin of it (`ghost-layers:layers`), or one of its offers
(`ghost-layers:sampler:torch.nn.modules.linear.Linear`).
"""


@dataclass
class Disabled:
    """What the environment names.

    Attributes:
        entries: The names, as given.
        known: The names that mean something, as they are met.
    """

    entries: tuple[str, ...]
    known: set[str] = field(default_factory=set)

    @classmethod
    def now(cls) -> Disabled:
        """Read the environment."""
        given = os.environ.get(DISABLED_VARIABLE, "").split(",")
        return cls(tuple(filter(None, map(str.strip, given))))

    def plugin(self, distribution: str, entry: str) -> bool:
        """Tell whether a plugin is switched off."""
        return self._named(distribution, distribution) | self._named(
            f"{distribution}:{entry}", distribution
        )

    def offer(self, plugin: str, kind: str, name: str) -> bool:
        """Tell whether an offer of a plugin, named `distribution:entry`, is switched off."""
        distribution = plugin.partition(":")[0]
        return self._named(f"{distribution}:{kind}:{name}", distribution)

    def warn(self) -> None:
        """Say which names mean nothing, once all plugins were asked."""
        known = {_canonical(name) for name in self.known}
        for entry in self.entries:
            if _canonical(entry) not in known:
                error = UnknownNameError(f"plugin in {DISABLED_VARIABLE}", entry, self.known)
                logger.warning("%s", error)

    def _named(self, name: str, distribution: str) -> bool:
        self.known.add(name)
        return _canonical(name) in map(_canonical, self.entries)


def _canonical(name: str) -> str:
    """Return a name with its distribution as package indexes compare them."""
    distribution, colon, rest = name.partition(":")
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower() + colon + rest.strip()
