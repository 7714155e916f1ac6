"""Whether a command may make a store in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from ghost_engines.cli.errors import CommandError
from ghost_engines.files import TEMPORARY
from ghost_engines.store import MANIFEST

_PARTS = frozenset({"committed.json", "parts", "parts.json", "shards"})
"""What writers make beside the manifest; what is there without one is for the store to judge."""

_SHOWN = 5


def check_folder(root: Path) -> None:
    """Refuse to make a store in a folder of something else, such as that of the model.

    In a program it may be: `GradientStore.create` leaves the files of others alone. At a shell it
    is a slip, and files of the store would be taken for the model's from then on.

    Raises:
        CommandError: If the folder holds no store, and what no writer of one has left.
        OSError: If it cannot be listed.
    """
    if not root.is_dir():
        return
    names = os.listdir(root)
    found = sorted(name for name in names if not name.startswith(".") and TEMPORARY not in name)
    # Asked after the names were: another process may be making the store.
    if not found or not _PARTS.isdisjoint(found) or (root / MANIFEST).exists():
        return
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise CommandError(
        f"--store: {root} is not empty, and holds no store, but {', '.join(found[:_SHOWN])}{more}",
        reason="a store has a folder of its own",
        remedy=f"give a folder that is empty or not there yet, such as --store {root / 'store'}",
    )
