"""The header of a file of tensors, in the format of safetensors: which bytes are which tensor.

Its library reads the same files. It opens a file twice, so that a writer may replace it in
between, takes an interrupt for an error of the file, and needs three times as long.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

SAFETENSORS_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""What safetensors calls the dtypes that are stored, in the order in which a file holds them."""

LENGTH_BYTES = 8
"""Bytes of the header's length, with which a file begins."""

LONGEST = 1 << 20
"""The most bytes that a header may have. Those of a store have some hundred."""

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_ORDER = {dtype: at for at, dtype in enumerate(SAFETENSORS_NAMES)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file has a tensor.

    Attributes:
        dtype: What safetensors calls its dtype.
        shape: Its shape.
        start: Its first byte in the file.
        stop: The byte after its last one.
    """

    dtype: str
    shape: list[int]
    start: int
    stop: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Its dtype, if it is one that is stored."""
        return _DTYPES.get(self.dtype)


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors in the order in which a file holds them."""
    return sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file, with its length before it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in in_order(tensors):
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.itemsize
        entries[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return struct.pack("<Q", len(text)) + text


def header_length(head: bytes, size: int) -> int:
    """Return the length of the header of a file of some size, from its first bytes.

    Raises:
        ValueError: If there is no header of that length.
    """
    if len(head) < LENGTH_BYTES:
        raise ValueError(f"it has {size} bytes")
    (length,) = struct.unpack_from("<Q", head)
    if length > min(size - LENGTH_BYTES, LONGEST):
        raise ValueError(f"it has {size} bytes, and its header would have {length}")
    return int(length)


def decode(header: bytes, size: int) -> tuple[dict[str, Any], dict[str, Place]]:
    """Return the metadata of a file of some size, and where its tensors are.

    Raises:
        ValueError: If the header is none, or some byte of the file belongs to no tensor, or to two.
    """
    try:
        entries = json.loads(header)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    base = LENGTH_BYTES + len(header)
    places = {name: _place(name, entry, base) for name, entry in entries.items()}
    at = base
    for place in sorted(places.values(), key=lambda place: (place.start, place.stop)):
        if place.start != at or not _fits(place):
            raise ValueError(f"its header does not fit its contents at byte {at}")
        at = place.stop
    if at != size:
        raise ValueError(f"it has {size} bytes, and should have {at}")
    return metadata, places


def _place(name: str, entry: Any, base: int) -> Place:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(dtype) is str and type(shape) is list and 0 <= start <= stop:
            numbers = {type(number) for number in (start, stop, *shape)}
            if numbers == {int} and min(shape, default=0) >= 0:
                return Place(dtype, shape, base + start, base + stop)
    except (KeyError, TypeError, ValueError):
        pass  # what is wrong with it does not matter
    raise ValueError(f"its header does not say where {name!r} is")


def _fits(place: Place) -> bool:
    """Return whether a tensor has as many bytes as it needs, and can be mapped there."""
    dtype = place.torch_dtype
    if dtype is None:
        return True  # whoever asks for tensors does not ask for one of these
    length = place.stop - place.start
    return length == prod(place.shape) * dtype.itemsize and place.start % dtype.itemsize == 0
