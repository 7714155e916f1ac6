"""What `ghost plugins` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ghost_core.plugins import installed, plural
from ghost_engines.cli.folder_options import Plugins
from ghost_engines.cli.tables import print_table


def run(options: Plugins) -> int:
    """Print a table of the installed plugins, and return the exit status."""
    alone = sys.stdout.isatty()
    print_table(
        ("plugin", "version", "offers" if alone else "offer", "status"),
        (
            (plugin.name, plugin.version, offer, plugin.status)
            for plugin in installed().plugins
            for offer in ([_counted(plugin.offers)] if alone else plugin.offers) or ["-"]
        ),
    )
    return 0


def _counted(offers: Sequence[str]) -> str:
    by_kind: dict[str, list[str]] = {}
    for offer in offers:
        by_kind.setdefault(offer.split()[0], []).append(offer)
    return (
        ", ".join(
            f"{len(alike)} {plural(kind)}" if len(alike) > 3 else ", ".join(alike)
            for kind, alike in by_kind.items()
        )
        or "-"
    )
