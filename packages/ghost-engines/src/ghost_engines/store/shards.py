"""Shards: unit u holds the rows with ordinals from u · U to (u + 1) · U in one safetensors file.

A shard's name depends on its unit alone and a unit is done when its file is full. The header says
which store the shard belongs to, its unit, and the sha256 of its tensors' bytes, in order of their
names. The last shard may be partial; a fuller version of it takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_engines.files import remove_temporaries
from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import DamagedStoreError
from ghost_engines.store.manifest import Manifest
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.tensor_files import (
    SAFETENSORS_NAMES,
    header,
    read_from,
    sha256_of,
    write_tensors,
)

SHARDS = "shards"
_PER_FOLDER = 1000
_PATTERN = "*/g-*.safetensors"
_LOSS_DTYPES = {SAFETENSORS_NAMES[dtype]: dtype for dtype in STORAGE_DTYPES.values()}


@dataclass(frozen=True)
class Shard:
    """A shard that is on disk.

    Attributes:
        n: Number of rows.
        loss_dtype: Dtype of the losses, if it has any.
    """

    n: int
    loss_dtype: torch.dtype | None


def shard_path(root: Path, unit: int) -> Path:
    """Return where a unit's shard is."""
    return root / SHARDS / f"{unit // _PER_FOLDER:05d}" / f"g-{unit:08d}.safetensors"


def write_shard(root: Path, manifest: Manifest, unit: int, rows: StoredRows) -> None:
    """Write a unit's shard; it is on disk once this returns.

    Raises:
        OSError: If that fails; a shard that was there before still is.
    """
    metadata = {"fingerprint": manifest.fingerprint, "unit": str(unit)}
    write_tensors(shard_path(root, unit), rows.tensors(), metadata, root)


def read_shard(root: Path, unit: int) -> StoredRows:
    """Read a unit's shard, mapped into memory; what is written to the tensors stays in memory.

    Raises:
        DamagedStoreError: If the file is missing or cut off.
    """
    return read_from(shard_path(root, unit), _rows)


def read_ids(root: Path, unit: int) -> Tensor:
    """Read a unit's sample ids, int64 `[n]`.

    Raises:
        DamagedStoreError: If the file is missing or cut off.
    """
    ids: Tensor = read_from(shard_path(root, unit), lambda file: file.get_tensor("ids"))
    return ids


def check_contents(root: Path, unit: int) -> None:
    """Compare a shard's contents with its hash.

    Raises:
        DamagedStoreError: If they differ.
    """
    path = shard_path(root, unit)
    (metadata, _), rows = read_from(path, lambda file: (header(file), _rows(file)))
    if sha256_of(rows.tensors()) != metadata.get("sha256"):
        raise DamagedStoreError(f"{path} was altered: its contents do not fit its sha256")


def find_shards(root: Path, manifest: Manifest) -> list[Shard]:
    """Return the shards of a store by unit, checked except for the hash of their contents.

    A writer may be at work at the same time.

    Raises:
        DamagedStoreError: If a shard is missing, partial though not the last, cut off, misplaced,
            or of another store. All such files are named.
    """
    listed = {_unit_of(root, path) for path in (root / SHARDS).glob(_PATTERN)}
    shards: list[Shard] = []
    problems: list[str] = []
    for unit in range(max(listed, default=-1) + 1):
        try:
            # Not more than is listed: a later shard may be there only since the listing, and
            # each one before it has then been full when its header is read.
            shards.append(_inspect(root, manifest, unit, last=unit == max(listed)))
        except DamagedStoreError as error:
            problems.append(str(error))
    if len({shard.loss_dtype for shard in shards}) > 1:
        problems.append(f"the shards in {root / SHARDS} do not all have the same kind of loss")
    if problems:
        more = f"\nand {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DamagedStoreError("\n".join(problems[:20]) + more)
    return shards


def has_shards(root: Path) -> bool:
    """Return whether there is any shard."""
    return any((root / SHARDS).glob(_PATTERN))


def clean(root: Path) -> None:
    """Remove what writers that were killed have left behind."""
    for folder in (root, *(root / SHARDS).glob("*")):
        remove_temporaries(folder)


def _unit_of(root: Path, path: Path) -> int:
    digits = path.name.removeprefix("g-").removesuffix(".safetensors")
    if not digits.isdecimal() or shard_path(root, int(digits)) != path:
        raise DamagedStoreError(f"{path} is not where a shard of that name belongs: remove it")
    return int(digits)


def _inspect(root: Path, manifest: Manifest, unit: int, *, last: bool) -> Shard:
    path = shard_path(root, unit)
    metadata, found = read_from(path, header)
    if metadata.get("fingerprint") != manifest.fingerprint:
        raise DamagedStoreError(f"{path} belongs to another store: its fingerprint does not fit")
    if metadata.get("unit") != str(unit):
        raise DamagedStoreError(f"{path} holds unit {metadata.get('unit')}: it was renamed")
    n = found["ids"][0][0] if "ids" in found and found["ids"][0] else 0
    loss = found.pop("loss", None)
    expected = {
        "g": ([n, manifest.k_total], SAFETENSORS_NAMES[manifest.torch_dtype]),
        "ids": ([n], SAFETENSORS_NAMES[torch.int64]),
    }
    fits = found == expected and (loss is None or (loss[0] == [n] and loss[1] in _LOSS_DTYPES))
    if not fits or "sha256" not in metadata:
        raise DamagedStoreError(f"{path} was altered: it holds {found}, not {expected}")
    if not 1 <= n <= manifest.unit or (n < manifest.unit and not last):
        raise DamagedStoreError(f"{path} holds {n} rows, not {manifest.unit}")
    return Shard(n, None if loss is None else _LOSS_DTYPES[loss[1]])


def _rows(file: Any) -> StoredRows:
    loss = file.get_tensor("loss") if "loss" in set(file.keys()) else None
    return StoredRows(file.get_tensor("ids"), file.get_tensor("g"), loss)
