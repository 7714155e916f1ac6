"""Files of tensors with their hash: written as a whole, and read while a writer replaces them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ghost_engines.files import open_regular, write_atomically
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.hashes import HASHES, bytes_of, hash_of, hash_of_pieces
from ghost_engines.store.tensor_header import (
    LENGTH_BYTES,
    Place,
    decode,
    encode,
    header_length,
    in_order,
)

_HEAD = 4096
"""Bytes to read at first; a store's header is shorter."""

_PIECE = 1 << 18
"""Bytes to read at once where they are not kept."""

_WORTH_MAPPING = 1 << 20
"""Bytes from which on a tensor is mapped. A process can have some 65,000 maps, all in all."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    root: Path,
    kind: str = "sha256",
    *,
    shared: bool = False,
) -> None:
    """Write tensors on the CPU, with a hash of their bytes; on disk once this returns.

    Args:
        path: The file, in or below `root`.
        tensors: The tensors by name, of dtypes that are stored.
        metadata: What else the header says.
        root: A folder that is there, and on disk.
        kind: Which hash, by its name in `HASHES`.
        shared: Whether others may write the same file at the same time, as readers of a store do.

    Raises:
        OSError: If that fails; a file that was there before still is.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    head = encode(whole, {**metadata, kind: hash_of(whole, kind)})
    parts: list[bytes | memoryview] = [head]
    parts += (bytes_of(whole[name]) for name in in_order(whole))
    write_atomically(path, parts, root, shared=shared)


def header(file: TensorFile) -> tuple[dict[str, str], dict[str, tuple[list[int], str]]]:
    """Return the metadata of an open file, and shapes and dtypes by the names of its tensors."""
    shapes = {name: (place.shape, place.dtype) for name, place in file.places.items()}
    return file.metadata, shapes


class TensorFile:
    """An open file of tensors. What a writer puts in its place from now on does not show.

    Args:
        path: The file.

    Attributes:
        path: The file.
        version: What tells it from a file that replaces it.
        metadata: What the header says beside the tensors.
        places: Where its tensors are, by name.

    Raises:
        DamagedStoreError: If the file is missing, cut off or no file of tensors.
        OSError: If it cannot be read.
    """

    path: Path
    version: tuple[int, int, int]
    metadata: dict[str, Any]
    places: dict[str, Place]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = open_regular(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedStoreError(f"{path} is missing") from error
        except ValueError as error:
            raise DamagedStoreError(f"{path} is not a shard: {error}") from error
        try:
            status = os.fstat(self._descriptor)
            self.version = status.st_ino, status.st_mtime_ns, status.st_size
            self._size = status.st_size
            self.metadata, self.places = self._layout()
        except ValueError as error:
            self.close()
            raise DamagedStoreError(f"{path} is cut off or not a shard: {error}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Tensors that were mapped stay."""
        os.close(self._descriptor)

    def keys(self) -> Iterable[str]:
        """Return the names of its tensors."""
        return self.places.keys()

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped if it is large; what is written to it stays in memory.

        Raises:
            StoreError: If it cannot be mapped.
            DamagedStoreError: If the file is cut off.
            OSError: If it cannot be read.
        """
        place = self.places[name]
        if place.stop - place.start < _WORTH_MAPPING:
            return self.read_tensor(name)
        try:
            storage = torch.UntypedStorage.from_file(
                f"/dev/fd/{self._descriptor}", False, self._size
            )
        except RuntimeError as error:
            raise StoreError(
                f"{self.path} cannot be mapped: {error}",
                reason="a process can have some 65,000 maps, and as much memory as there is",
                remedy="let go of rows that were read before, or read fewer at once",
            ) from error
        whole = torch.empty(0, dtype=torch.uint8, device="cpu")
        whole.set_(storage)  # type: ignore[arg-type]
        return whole[place.start : place.stop].view(self._dtype(name)).view(place.shape)

    def read_tensor(self, name: str) -> Tensor:
        """Return a tensor in memory of its own.

        Raises:
            DamagedStoreError: If the file is cut off.
            OSError: If it cannot be read.
        """
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=self._dtype(name), device="cpu")
        self._read_into(bytes_of(tensor), place.start)
        return tensor

    def read_rows(self, name: str, start: int, into: Tensor) -> None:
        """Read some entries along the first axis of a tensor.

        Args:
            name: Name of the tensor.
            start: The first entry to read.
            into: Contiguous memory for as many as are read, in the tensor's dtype.

        Raises:
            DamagedStoreError: If the file is cut off.
            OSError: If it cannot be read.
        """
        bytes_each = into[:1].nbytes
        self._read_into(bytes_of(into), self.places[name].start + start * bytes_each)

    @property
    def kind(self) -> str | None:
        """Which hash its header has, if any."""
        return next((kind for kind in HASHES if isinstance(self.metadata.get(kind), str)), None)

    def hash(self, kind: str) -> str:
        """Return a hash of the tensors' bytes, in order of their names.

        They are read and not mapped: a disk that fails is an error then, and no signal.

        Args:
            kind: Which hash, by its name in `HASHES`.

        Raises:
            DamagedStoreError: If the file is cut off.
            OSError: If it cannot be read.
        """
        return hash_of_pieces(self._all_pieces(), kind)

    def _all_pieces(self) -> Iterator[memoryview]:
        piece = memoryview(bytearray(_PIECE))
        for name in sorted(self.places):
            place = self.places[name]
            for start in range(place.start, place.stop, _PIECE):
                part = piece[: min(_PIECE, place.stop - start)]
                self._read_into(part, start)
                yield part

    def _dtype(self, name: str) -> torch.dtype:
        place = self.places[name]
        if place.torch_dtype is None:
            raise DamagedStoreError(f"{self.path} holds {name} as {place.dtype}, which is not read")
        return place.torch_dtype

    def _layout(self) -> tuple[dict[str, Any], dict[str, Place]]:
        head = os.pread(self._descriptor, _HEAD, 0)
        length = header_length(head, self._size)
        text = head[LENGTH_BYTES : LENGTH_BYTES + length]
        if len(text) < length:
            longer = bytearray(length)
            self._read_into(memoryview(longer), LENGTH_BYTES)
            text = bytes(longer)
        return decode(text, self._size)

    def _read_into(self, into: memoryview, start: int) -> None:
        while into:
            read = os.preadv(self._descriptor, [into], start)
            if read == 0:
                raise DamagedStoreError(f"{self.path} is cut off at byte {start}")
            into, start = into[read:], start + read
