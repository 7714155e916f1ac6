"""Which shards a store's folders hold, by their names alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ghost_engines.files import remove_temporaries
from ghost_engines.store.errors import DamagedStoreError

SHARDS = "shards"
_PER_FOLDER = 1000
_PREFIX, _SUFFIX = "g-", ".safetensors"


def shard_path(root: Path, unit: int) -> Path:
    """Return where a unit's shard is."""
    return root.joinpath(SHARDS, *_names(unit))


def listed_units(root: Path) -> list[int]:
    """Return the units of which there are shards, in order.

    Raises:
        DamagedStoreError: If a shard or a folder is not where one of that name belongs.
        OSError: If a folder cannot be listed: what is in it is not known then, and may be all.
    """
    return sorted(_unit_of(root, *names) for names in _shards(root))


def has_shards(root: Path) -> bool:
    """Return whether there is any shard.

    Raises:
        DamagedStoreError: If something else stands in the place of a folder.
        OSError: If a folder cannot be listed.
    """
    return any(True for _ in _shards(root))


def clean(root: Path) -> None:
    """Remove what writers that were killed have left behind.

    Raises:
        DamagedStoreError: If something else stands in the place of a folder.
        OSError: If a folder cannot be listed, or a file cannot be removed.
    """
    for folder in (root, *_folders(root)):
        remove_temporaries(folder)


def _shards(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of the folder and the file of each shard."""
    for folder in _folders(root):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                    yield folder.name, entry.name


def _folders(root: Path) -> list[Path]:
    """Return the folders of shards. Files of other programs may lie beside them."""
    folder = root / SHARDS
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.is_dir() or entry.name.isdecimal()]
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise DamagedStoreError(f"{folder} is not a folder: put back what stood there") from error
    for entry in found:
        if not entry.is_dir():
            raise DamagedStoreError(f"{entry.path} is not a folder: put back what stood there")
    return [folder / entry.name for entry in found]


def _unit_of(root: Path, folder: str, name: str) -> int:
    digits = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    if not digits.isdecimal() or _names(int(digits)) != (folder, name):
        path = root / SHARDS / folder / name
        raise DamagedStoreError(f"{path} is not where a shard of that name belongs: remove it")
    return int(digits)


def _names(unit: int) -> tuple[str, str]:
    """Return the names of a shard's folder and file. 100,000 of them are made to open a store."""
    return f"{unit // _PER_FOLDER:05d}", f"{_PREFIX}{unit:08d}{_SUFFIX}"
