"""Files of tensors with their hash: written as a whole, and read while a writer replaces them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ghost_engines.files import write_atomically
from ghost_engines.store.errors import DamagedStoreError

SAFETENSORS_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""What safetensors calls the dtypes that are stored."""

ResultT = TypeVar("ResultT")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], root: Path
) -> None:
    """Write tensors on the CPU, with the sha256 of their bytes; on disk once this returns.

    Args:
        path: The file, in or below `root`.
        tensors: The tensors by name.
        metadata: What else the header says.
        root: A folder that is there, and on disk.

    Raises:
        OSError: If that fails; a file that was there before still is.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, {**metadata, "sha256": sha256_of(whole)}), root)


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the bytes of contiguous tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_from(path: Path, get: Callable[[Any], ResultT]) -> ResultT:
    """Get something from an open file that a writer may replace at any moment.

    Raises:
        DamagedStoreError: If the file is missing or cut off.
    """
    while True:
        version = _version(path)
        try:
            with safe_open(path, "pt") as file:
                result = get(file)
        except (SafetensorError, FileNotFoundError) as error:
            if _version(path) == version:
                raise DamagedStoreError(f"{path} is cut off or not a shard: {error}") from error
        else:
            # safetensors opens the path twice: the header and the data may be of two versions.
            if _version(path) == version:
                return result


def _version(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{path} is missing") from error
    return status.st_ino, status.st_mtime_ns, status.st_size


def header(file: Any) -> tuple[dict[str, str], dict[str, tuple[list[int], str]]]:
    """Return the metadata of an open file, and shapes and dtypes by the names of its tensors."""
    pieces = {name: file.get_slice(name) for name in set(file.keys())}
    shapes = {name: (piece.get_shape(), str(piece.get_dtype())) for name, piece in pieces.items()}
    return file.metadata() or {}, shapes
