"""Shards: unit u holds the rows with ordinals from u · U to (u + 1) · U in one safetensors file.

A shard's name depends on its unit alone and a unit is done when its file is full. The header says
which store the shard belongs to, its unit, and a hash of its tensors' bytes, in order of their
names. The last shard may be partial; a fuller version of it takes its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ghost_engines.store.beside import LOSS
from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.hashes import hash_of
from ghost_engines.store.labels import Labels, decode_names, encode_names
from ghost_engines.store.listing import SHARDS, listed_units, shard_path
from ghost_engines.store.manifest import Manifest
from ghost_engines.store.parts import Part
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.tensor_files import TensorFile, header, write_tensors
from ghost_engines.store.tensor_header import SAFETENSORS_NAMES

_LOSS_DTYPES = {SAFETENSORS_NAMES[dtype]: dtype for dtype in STORAGE_DTYPES.values()}

_SHOWN = 20
"""The most problems that an error names."""

_UNLISTED = 1000
"""The most shards that writers may have added while a folder was listed."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that is on disk.

    Attributes:
        n: Number of rows.
        loss_dtype: Dtype of the losses, if it has any.
        ids_hash: What tells its ids from others.
        hash: What tells all that it holds from others.
    """

    n: int
    loss_dtype: torch.dtype | None
    ids_hash: str
    hash: str


def write_shard(
    part: Part, manifest: Manifest, unit: int, rows: StoredRows, *, replaced: int
) -> None:
    """Write a unit's shard; it is on disk once this returns.

    Args:
        part: The part of the store.
        manifest: What the rows are.
        unit: The unit.
        rows: Its rows so far.
        replaced: How many of them the shard on disk has, as far as the writer knows.

    Raises:
        StoreError: If there is a shard with other rows, which is left as it is.
        DamagedStoreError: If there is something that is no shard of this store.
        OSError: If writing fails; a shard that was there before still is.
    """
    path = shard_path(part.root, unit)
    tensors = _on_disk(rows)
    if path.exists():
        with open_shard(part, manifest, unit) as file:
            n = inspect(file, manifest).n
            # One that a failed write has left holds what is written again now.
            known = n == replaced or file.metadata[manifest.hash] == hash_of(tensors, manifest.hash)
        if not known:
            raise StoreError(
                f"{path} has {n} rows and is not overwritten",
                reason=f"this writer knows of {replaced} rows there: it, or another program, has "
                "not seen all that is in the store",
                remedy="close the store and resume it",
            )
    metadata = {"fingerprint": manifest.fingerprint, "unit": str(unit)}
    if part.name:
        metadata["part"] = part.name
    for name in sorted(tensors.keys() - {"g"}):  # these are also read without the rows
        metadata[f"{manifest.hash}.{name}"] = hash_of({name: tensors[name]}, manifest.hash)
    write_tensors(path, tensors, metadata, part.root, manifest.hash)


def _on_disk(rows: StoredRows) -> dict[str, Tensor]:
    """Return what a shard holds: of names those that its rows have, so that it depends on no other.

    All is contiguous.
    """
    tensors = rows.tensors()
    for name, column in rows.columns.items():
        if isinstance(column, Labels):
            labels = column.compact()
            tensors[name], tensors[_names_of(name)] = labels.codes, encode_names(labels.names)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _names_of(name: str) -> str:
    return f"{name}.names"


def open_shard(part: Part, manifest: Manifest, unit: int) -> TensorFile:
    """Open a unit's shard, which its header says that it is.

    Raises:
        DamagedStoreError: If the file is missing, cut off, or of another store or unit.
        OSError: If it cannot be read.
    """
    file = TensorFile(shard_path(part.root, unit))
    try:
        if file.metadata.get("fingerprint") != manifest.fingerprint:
            raise DamagedStoreError(
                f"{file.path} belongs to another store: its fingerprint does not fit"
            )
        if file.metadata.get("unit") != str(unit):
            raise DamagedStoreError(
                f"{file.path} holds unit {file.metadata.get('unit')}: it was renamed"
            )
        if file.metadata.get("part", "") != part.name:
            raise DamagedStoreError(f"{file.path} is of another part of the store: it was moved")
    except BaseException:
        file.close()
        raise
    return file


def inspect(file: TensorFile, manifest: Manifest) -> Shard:
    """Return what an open shard holds, as its header says.

    Raises:
        DamagedStoreError: If these are no rows of the store, or too many.
    """
    _, found = header(file)
    n = found["ids"][0][0] if "ids" in found and found["ids"][0] else 0
    loss = found.get(LOSS)
    if LOSS not in manifest.declared:
        found.pop(LOSS, None)
    expected = {
        "g": ([n, manifest.k_total], SAFETENSORS_NAMES[manifest.torch_dtype]),
        "ids": ([n], SAFETENSORS_NAMES[torch.int64]),
    }
    for name, column in manifest.declared.items():
        expected[name] = [n], SAFETENSORS_NAMES[column.torch_dtype]
        if column.is_category:  # a table as long as the names in it
            length = found.get(_names_of(name), ([], ""))[0][:1]
            expected[_names_of(name)] = length, SAFETENSORS_NAMES[torch.uint8]
    fits = found == expected and (loss is None or (loss[0] == [n] and loss[1] in _LOSS_DTYPES))
    if not fits or file.kind != manifest.hash:
        raise DamagedStoreError(f"{file.path} was altered: it holds {found}, not {expected}")
    if not 1 <= n <= manifest.unit:
        raise DamagedStoreError(f"{file.path} holds {n} rows, not {manifest.unit}")
    whole = str(file.metadata[file.kind])
    ids_hash = str(file.metadata.get(f"{file.kind}.ids") or whole)
    return Shard(n, None if loss is None else _LOSS_DTYPES[loss[1]], ids_hash, whole)


def check_contents(file: TensorFile) -> None:
    """Compare an open shard's contents with its hash.

    Raises:
        DamagedStoreError: If they differ, or the file is cut off.
        OSError: If it cannot be read.
    """
    kind = file.kind
    if kind is None or file.hash(kind) != file.metadata[kind]:
        raise DamagedStoreError(f"{file.path} was altered: its contents do not fit its {kind}")


def read_column(file: TensorFile, name: str, *, check: bool) -> Tensor | Labels:
    """Read what an open shard holds of each row under a name.

    Args:
        file: The shard.
        name: Name of the column.
        check: Whether to compare it with its hash.

    Raises:
        DamagedStoreError: If it was altered, or the file is cut off.
        OSError: If it cannot be read.
    """
    read = _read_checked if check else TensorFile.read_tensor
    numbers = read(file, name)
    if _names_of(name) not in file.places:
        return numbers
    return _labels(file, numbers, read(file, _names_of(name)))


def _labels(file: TensorFile, codes: Tensor, names: Tensor) -> Labels:
    try:
        return Labels(codes, decode_names(names, codes))
    except ValueError as error:
        raise DamagedStoreError(f"{file.path} was altered: {error}") from error


def _read_checked(file: TensorFile, name: str) -> Tensor:
    own = file.metadata.get(f"{file.kind}.{name}")
    if own is None:  # written by a version that hashed all together
        check_contents(file)
        return file.read_tensor(name)
    tensor = file.read_tensor(name)
    if hash_of({name: tensor}, str(file.kind)) != own:
        raise DamagedStoreError(f"{file.path} was altered: its {name} does not fit its {file.kind}")
    return tensor


def rows_of(file: TensorFile, manifest: Manifest) -> StoredRows:
    """Return the rows of an open shard, mapped if they are large.

    Raises:
        DamagedStoreError: If the file is cut off.
        OSError: If it cannot be read.
    """
    loss = file.get_tensor(LOSS) if LOSS in file.places else None
    columns: dict[str, Tensor | Labels] = {}
    for name, column in manifest.declared.items():
        if name != LOSS:
            columns[name] = numbers = file.get_tensor(name)
            if column.is_category:
                columns[name] = _labels(file, numbers, file.read_tensor(_names_of(name)))
    return StoredRows(file.get_tensor("ids"), file.get_tensor("g"), loss, columns)


def find_shards(part: Part, manifest: Manifest) -> list[Shard]:
    """Return the shards of a part by unit, checked except for the hash of their contents.

    A writer may be at work at the same time.

    Raises:
        DamagedStoreError: If a shard is missing, partial though not the last, cut off, misplaced,
            or of another store. The first such files are named.
        OSError: If a folder cannot be listed, or a shard cannot be read.
    """
    listed = listed_units(part.root)
    last = listed[-1] if listed else -1
    problems: list[str] = []
    units: Iterable[int] = range(last + 1)
    # Not more than is listed: a later shard may be there only since the listing, and each one
    # before it has then been full when its header is read. Some before it may have been added
    # while others were listed, but not as many as one stray name can stand for.
    if last + 1 - len(listed) > _UNLISTED:
        problems.append(f"{last + 1 - len(listed)} shards before {shard_path(part.root, last)}")
        problems[0] += " are missing: was it put there by mistake?"
        units = listed
    shards = _inspected(part, manifest, units, last, problems)
    if len({shard.loss_dtype for shard in shards}) > 1:
        problems.append(f"the shards in {part.root / SHARDS} do not all have the same kind of loss")
    if problems:
        more = f"\nand {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DamagedStoreError("\n".join(problems[:_SHOWN]) + more)
    return shards


def _inspected(
    part: Part, manifest: Manifest, units: Iterable[int], last: int, problems: list[str]
) -> list[Shard]:
    """Return what the shards of some units hold; add to the problems what is wrong with others."""
    shards = []
    for unit in units:
        try:
            with open_shard(part, manifest, unit) as file:
                shard = inspect(file, manifest)
                if shard.n < manifest.unit and unit != last:
                    raise DamagedStoreError(
                        f"{file.path} holds {shard.n} rows, not {manifest.unit}"
                    )
            shards.append(shard)
        except DamagedStoreError as error:
            problems.append(str(error))
    return shards


def one_loss_dtype(path: Path, parts: Sequence[tuple[Part, Sequence[Shard]]]) -> torch.dtype | None:
    """Return the dtype of the losses of all parts of a store; None if they have none.

    Raises:
        DamagedStoreError: If parts differ.
    """
    kinds = {shards[0].loss_dtype for _, shards in parts if shards}
    if len(kinds) > 1:
        raise DamagedStoreError(
            f"the parts of {path} do not all have the same kind of loss",
            reason=f"their writers appended {', '.join(sorted(map(str, kinds)))}",
            remedy='declare the losses when a store is made, as in columns={"loss": "float32"}',
        )
    return kinds.pop() if kinds else None


def digest_of(fingerprint: str, parts: Sequence[tuple[Part, Sequence[Shard]]]) -> str:
    """Return the sha256 of which samples the shards of all parts have, in hexadecimal."""
    digest = hashlib.sha256(fingerprint.encode())
    for part, shards in parts:
        digest.update(f"\n{part.name} {len(shards)}".encode())
        for shard in shards:
            digest.update(f" {shard.n} {shard.ids_hash}".encode())
    return digest.hexdigest()
