"""What is the same for all shards of a log."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ghost_engines.files import read_regular, write_json
from ghost_engines.processes import process_count
from ghost_engines.store import DamagedStoreError, MissingLogError, StoreError, has_shards

SCHEMA = 1
MANIFEST = "log.json"
_LONGEST = 4096


@dataclass(frozen=True)
class Manifest:
    """What is the same for all shards of a log.

    Attributes:
        name: Tells this log from all others.
        unit: Rows of a full shard, at least.
        processes: Number of processes that train together, each with a log of its own; None in a
            log that does not say.
        schema: Version of the format.
    """

    name: str
    unit: int
    processes: int | None = None
    schema: int = SCHEMA

    @classmethod
    def new(cls, unit: int) -> Self:
        """Return that of a new log."""
        return cls(uuid.uuid4().hex, unit, process_count())

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read the manifest of a log.

        Raises:
            StoreError: If there is no log, or a newer version of ghost wrote it.
            DamagedStoreError: If the file was altered.
        """
        path = root / MANIFEST
        try:
            data = read_regular(path, _LONGEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingLogError(
                f"there is no score log at {root}", remedy="make one with ScoreLog.create(path)"
            ) from error
        except ValueError as error:
            raise DamagedStoreError(f"{path} is not a log's manifest: {error}") from error
        try:
            found = cls(**json.loads(data))
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedStoreError(f"{path} is not a log's manifest: {error!r}") from error
        if found.schema != SCHEMA:
            raise StoreError(
                f"{path} has format version {found.schema}, this version of ghost reads {SCHEMA}: "
                "use the one that wrote it"
            )
        if not isinstance(found.unit, int) or found.unit < 1:
            raise DamagedStoreError(f"{path} was altered: its unit is {found.unit!r}")
        known = found.processes
        if known is not None and (type(known) is not int or known < 1):
            raise DamagedStoreError(f"{path} was altered: it has processes={found.processes!r}")
        return found

    def write(self, root: Path) -> None:
        """Write it into the folder of a log.

        Raises:
            OSError: If that fails.
        """
        write_json(root / MANIFEST, asdict(self), root)


def has_log(root: Path) -> bool:
    """Tell whether there is a log in a folder."""
    return (root / MANIFEST).exists()


def make_log(root: Path, manifest: Manifest) -> None:
    """Write the manifest of a new log into a folder that is there.

    Raises:
        StoreError: If there is a log already.
        DamagedStoreError: If there are shards without a manifest, or of something else.
        OSError: If it cannot be written.
    """
    if has_log(root):
        raise StoreError(
            f"there is a score log at {root} already: go on with ScoreLog.resume(path, "
            "after=STEP), or read it with ScoreLog.open(path)"
        )
    if has_shards(root):
        raise DamagedStoreError(
            f"{root / MANIFEST} is missing, but there are shards: restore it, or remove them"
        )
    manifest.write(root)
