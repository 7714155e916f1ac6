"""What `ghost plugins` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ghost_core.plugins import installed
from ghost_engines.cli.tables import print_table


def show() -> int:
    """Print a table of the installed plugins, and return the exit status."""
    shown = _counted if sys.stdout.isatty() else ", ".join
    print_table(
        ("plugin", "version", "offers", "status"),
        (
            (plugin.name, plugin.version, shown(plugin.offers) or "-", plugin.status)
            for plugin in installed().plugins
        ),
    )
    return 0


def _counted(offers: Sequence[str]) -> str:
    by_kind: dict[str, list[str]] = {}
    for offer in offers:
        by_kind.setdefault(offer.split()[0], []).append(offer)
    return ", ".join(
        f"{len(alike)} {kind}s" if len(alike) > 3 else ", ".join(alike)
        for kind, alike in by_kind.items()
    )
