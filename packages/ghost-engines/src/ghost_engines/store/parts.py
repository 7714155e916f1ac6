"""Parts of a store, of which each is written by one writer, without a word between them.

A store that was made with `create` has one part, its own folder. One that writers have joined has
a part in `parts/<name>` for each, and knows their names: a part that went missing is missed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ghost_engines.files import make_root, read_regular, write_json
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.manifest import Manifest

PARTS = "parts"
REGISTER = "parts.json"
_LONGEST = 1 << 26
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """What one writer writes.

    Attributes:
        root: Its folder, with its shards, lock and record.
        name: Its name; empty where a store has no parts.
    """

    root: Path
    name: str = ""


def part_name(part: str | tuple[int, int]) -> str:
    """Return the name of a part, given as such or as the number of a writer among how many.

    Raises:
        StoreError: If it cannot be one.
    """
    match part:
        case (int(rank), int(world)) if 0 <= rank < world < 10**5:
            return f"{rank:05d}-of-{world:05d}"
        case str(name) if _NAME.fullmatch(name):
            return name
    raise StoreError(
        f"{part!r} cannot be a part of a store",
        reason="a part is a folder, and what one writer alone writes",
        remedy='give (rank, world), or a name such as "host-3" of letters, digits, _, - and dots',
    )


def part_of(root: Path, name: str) -> Part:
    """Return a part of the store in a folder."""
    return Part(root / PARTS / name, name)


def has_parts(root: Path) -> bool:
    """Return whether writers have joined a store.

    Raises:
        OSError: If that cannot be told.
    """
    try:
        (root / REGISTER).lstat()
    except FileNotFoundError:
        return False
    return True


def registered(root: Path, manifest: Manifest) -> list[Part]:
    """Return the parts of a store in order of their names; none if no writer has joined it.

    Raises:
        DamagedStoreError: If the register was altered or is of another store, or it and the
            folders differ.
        OSError: If it cannot be read.
    """
    path = root / REGISTER
    try:
        content = json.loads(read_regular(path, _LONGEST))
    except FileNotFoundError:
        content = {"fingerprint": manifest.fingerprint, "parts": []}
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{path} is no register of a store's parts: {error}") from error
    match content:
        case {"fingerprint": manifest.fingerprint, "parts": [*names]} if all(map(_is_name, names)):
            parts = [part_of(root, name) for name in sorted(set(names))]
        case {"fingerprint": str(), "parts": [*_]}:
            raise DamagedStoreError(f"{path} belongs to another store, or names no parts")
        case _:
            raise DamagedStoreError(f"{path} is no register of a store's parts")
    for part in parts:
        if not part.root.is_dir():
            raise DamagedStoreError(f"{part.root} is missing, which a writer had joined with")
    known = {part.name for part in parts}
    for folder in (root / PARTS).iterdir() if (root / PARTS).exists() else ():
        if folder.name not in known and (folder / "shards").exists():
            raise DamagedStoreError(
                f"{folder} holds shards, but {path} does not name it",
                reason="a part is made by joining the store; the register was replaced or removed",
                remedy="put the register back; or move the folder away",
            )
    return parts


def register(root: Path, manifest: Manifest, name: str) -> Part:
    """Make a part of a store, if it is new; nobody else may do so at the same time.

    Raises:
        DamagedStoreError: If the register was altered or is of another store.
        OSError: If it cannot be written.
    """
    part = part_of(root, name)
    names = [each.name for each in registered(root, manifest)]  # of which none is missing
    make_root(part.root)  # before it is named: what is named must be there
    if name not in names:
        content = {"fingerprint": manifest.fingerprint, "parts": sorted([*names, name])}
        write_json(root / REGISTER, content, root, indent=None)
    return part


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
