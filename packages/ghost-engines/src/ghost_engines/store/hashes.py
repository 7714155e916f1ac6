"""Hashes of what shards hold, against accidents: disks that forget, copies that stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FAST = "xxh3_128"
"""Hashes ten times as fast as sha256, and finds the same accidents; neither is signed."""


def _xxh3() -> Any:
    # Engines run from a plain checkout without it, as `tools/gpu.py` has them.
    import xxhash

    return xxhash.xxh3_128()


HASHES: Mapping[str, Callable[[], Any]] = {FAST: _xxh3, "sha256": hashlib.sha256}
"""Hashes by the names that headers have for them."""


def hash_of(tensors: Mapping[str, Tensor], kind: str) -> str:
    """Return a hash of the bytes of contiguous tensors, in order of their names."""
    return hash_of_pieces((bytes_of(tensors[name]) for name in sorted(tensors)), kind)


def hash_of_pieces(pieces: Iterable[bytes | memoryview], kind: str) -> str:
    """Return a hash of bytes, given piece by piece, in hexadecimal."""
    digest = HASHES[kind]()
    for piece in pieces:
        digest.update(piece)
    found: str = digest.hexdigest()
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    # A view of the flat tensor: one of no rows has no last axis to view otherwise.
    return tensor.reshape(-1).view(torch.uint8).numpy().data
