"""How many rows were committed: to tell a store whose last shards are missing from a short one.

Every shard but the last is missed by its number. A writer that is killed has recorded what it had
committed before, so that a store may have more rows than its record says, and never fewer.
"""

from __future__ import annotations

import json
from pathlib import Path

from ghost_engines.files import read_regular, write_json
from ghost_engines.store.errors import DamagedStoreError
from ghost_engines.store.manifest import Manifest

COMMITTED = "committed.json"
_LONGEST = 4096


def read_committed(root: Path, manifest: Manifest) -> int:
    """Return how many rows a store must have at least; 0 if nothing is recorded.

    Raises:
        DamagedStoreError: If the record was altered, or is that of another store.
        OSError: If it cannot be read.
    """
    path = root / COMMITTED
    try:
        content = json.loads(read_regular(path, _LONGEST))
    except FileNotFoundError:
        return 0
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{path} is no record of a store's rows: {error}") from error
    match content:
        case {"fingerprint": str(fingerprint), "rows": int(rows)} if rows >= 0:
            if fingerprint == manifest.fingerprint:
                return rows
            raise DamagedStoreError(f"{path} belongs to another store")
    raise DamagedStoreError(f"{path} is no record of a store's rows: {content!r}")


def write_committed(root: Path, manifest: Manifest, rows: int) -> None:
    """Record that a number of rows is on disk.

    Raises:
        OSError: If that fails; the record from before still is there.
    """
    content = {"fingerprint": manifest.fingerprint, "rows": rows}
    write_json(root / COMMITTED, content, root, indent=None)


def check_committed(root: Path, recorded: int, rows: int) -> None:
    """Raise if a store has fewer rows than were committed.

    Raises:
        DamagedStoreError: If it has.
    """
    if rows < recorded:
        raise DamagedStoreError(
            f"{root} holds {rows} rows, but {recorded} were committed",
            reason="the last shards are missing, or were replaced by older versions",
            remedy="put them back, as from a copy; to go on without them, remove "
            f"{root / COMMITTED}",
        )
