"""The data that a store's rows come from: where it was, and a digest of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ghost_engines.store.errors import StoreError


@dataclass(frozen=True)
class DataFile:
    """A file, or whatever else has a digest, from which samples come.

    A column of source numbers, with offsets beside it, can say for each row from which place in
    which of a store's data it comes.

    Attributes:
        path: Where it was. Not part of the fingerprint, as data may move.
        digest: What tells it from other data. Part of the fingerprint.
    """

    path: str
    digest: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """Return a file with the sha256 of its bytes, which is read as a whole.

        Raises:
            OSError: If it cannot be read.
        """
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(str(Path(path).absolute()), f"sha256:{digest}")


def as_entries(data: Sequence[DataFile] | None) -> list[dict[str, Any]]:
    """Return data as a manifest holds them.

    Raises:
        StoreError: If they are no data files.
    """
    files = () if data is None else data
    if isinstance(files, str) or not isinstance(files, Sequence):
        raise StoreError(f"data must be a list of DataFile, not {data!r}")
    for file in files:
        if not isinstance(file, DataFile) or not all(map(_is_text, (file.path, file.digest))):
            raise StoreError(f"data must be a list of DataFile(path, digest), with {file!r} in it")
    return [asdict(file) for file in files]


def _is_text(value: object) -> bool:
    return type(value) is str
