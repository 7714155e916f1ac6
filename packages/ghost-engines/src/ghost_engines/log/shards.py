"""Shards of a log: consecutive steps in one safetensors file.

They lie where those of a store do. Shard u holds the steps after those of shard u - 1. It is full
once its steps take as many rows as the manifest says, one for each step and one for each of its
samples; only the last shard may be less than full, and a fuller version takes its place. A step is
never split. The header says which log the shard belongs to, its unit, its first and last step, the
names of the directions, and the sha256 of its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ghost_engines.files import remove
from ghost_engines.log.manifest import Manifest
from ghost_engines.log.steps import Directions, Steps
from ghost_engines.store import (
    DamagedStoreError,
    TensorFile,
    check_contents,
    header,
    listed_units,
    shard_path,
    write_tensors,
)


@dataclass(frozen=True)
class Shard:
    """A shard that is on disk.

    Attributes:
        steps: Number of steps.
        samples: Number of samples in them.
        first: Number of the first step.
        last: Number of the last step.
        directions: Names of the directions; empty if no step credits a sample.
    """

    steps: int
    samples: int
    first: int
    last: int
    directions: Directions

    @property
    def size(self) -> int:
        """Rows that it takes."""
        return self.steps + self.samples


def write_shard(
    root: Path, manifest: Manifest, unit: int, steps: Steps, directions: Directions
) -> Shard:
    """Write a shard; it is on disk once this returns.

    Raises:
        OSError: If that fails; a shard that was there before still is.
    """
    first, last = int(steps.numbers[0]), int(steps.numbers[-1])
    if not len(steps.ids):  # nothing tells how many directions there are
        directions, steps = (), replace(steps, values=steps.values.new_zeros(0, 0))
    metadata = {
        "log": manifest.name,
        "unit": str(unit),
        "first": str(first),
        "last": str(last),
        "directions": json.dumps(directions),
    }
    write_tensors(shard_path(root, unit), steps.tensors(), metadata, root)
    return Shard(len(steps), len(steps.ids), first, last, directions)


def read_shard(root: Path, unit: int, *, checked: bool = False) -> Steps:
    """Read the steps of a shard, mapped into memory if they are many.

    Args:
        root: Folder of the log.
        unit: The shard.
        checked: Whether to compare its contents with their hash.

    Raises:
        DamagedStoreError: If the file is missing, cut off, or altered.
        OSError: If it cannot be read.
    """
    with TensorFile(shard_path(root, unit)) as file:
        if checked:
            check_contents(file)
        names = ("steps", "counts", "altered", "ids", "values")
        return Steps(*(file.get_tensor(name) for name in names))


def remove_shard(root: Path, unit: int) -> None:
    """Remove a shard; it is gone from the disk once this returns.

    Raises:
        OSError: If that fails.
    """
    remove(shard_path(root, unit))


def find_shards(root: Path, manifest: Manifest) -> list[Shard]:
    """Return the shards of a log by unit, checked except for the hash of their contents.

    A writer may be at work at the same time.

    Raises:
        DamagedStoreError: If a shard is missing, cut off, misplaced, of another log, or its steps
            do not follow those of the one before.
        OSError: If a folder cannot be listed.
    """
    listed = listed_units(root)
    shards: list[Shard] = []
    for unit in range(max(listed, default=-1) + 1):
        shard = _inspect(root, manifest, unit)
        path = shard_path(root, unit)
        if shard.size < manifest.unit and unit < listed[-1]:
            raise DamagedStoreError(f"{path} is not full, and not the last one")
        if shards and shard.first <= shards[-1].last:
            raise DamagedStoreError(
                f"{path} starts with step {shard.first}, and the one before ends with "
                f"{shards[-1].last}"
            )
        shards.append(shard)
    if len({shard.directions for shard in shards if shard.samples}) > 1:
        raise DamagedStoreError(f"the shards of {root} have different directions")
    return shards


def directions_of(shards: Sequence[Shard]) -> Directions:
    """Return the names of the directions; none if no sample was credited."""
    return next((shard.directions for shard in shards if shard.samples), ())


def _inspect(root: Path, manifest: Manifest, unit: int) -> Shard:
    with TensorFile(shard_path(root, unit)) as file:
        metadata, found = header(file)
    if metadata.get("log") != manifest.name:
        raise DamagedStoreError(f"{file.path} belongs to another log")
    if metadata.get("unit") != str(unit):
        raise DamagedStoreError(f"{file.path} holds unit {metadata.get('unit')}: it was renamed")
    try:
        directions = tuple(json.loads(metadata["directions"]))
        steps, samples = found["steps"][0][0], found["ids"][0][0]
        first, last = int(metadata["first"]), int(metadata["last"])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DamagedStoreError(f"{file.path} was altered: its header lacks {error}") from error
    expected = {
        "altered": ([steps], "I64"),
        "counts": ([steps], "I64"),
        "ids": ([samples], "I64"),
        "steps": ([steps], "I64"),
        "values": ([samples, len(directions) if samples else 0], "F64"),
    }
    if found != expected or not steps or "sha256" not in metadata:
        raise DamagedStoreError(f"{file.path} was altered: it holds {found}, not {expected}")
    return Shard(steps, samples, first, last, directions)
