"""Blocks of tokens in a memory-mapped file, as a data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ghost_engines.corpus.errors import CorpusError, position
from ghost_engines.corpus.sidecar import DTYPES, TokenFormat, missing

_PART = 1 << 24


class TokenBlock(TypedDict):
    """A sample: a block of tokens with its id.

    Attributes:
        input_ids: int64 `[T]`.
        sample_id: The id.
    """

    input_ids: Tensor
    sample_id: int


class TokenMemmap(Dataset[TokenBlock]):
    """The blocks of T tokens of a file, read when they are asked for.

    The file is mapped, not loaded. Workers of a `DataLoader` map it anew: what is pickled is the
    path. Samples are dictionaries, with their ids: `IdCollator` and `take_ids` handle them, as do
    torch's own collate function and, with labels, a trainer's.

    A block's id is `first_id` of the sidecar plus its number, and so stays the same whatever else
    is read with it. What does not fill a block at the end of the file is never read.

    Args:
        path: The file, `{split}-{domain}.bin`, whose sidecar lies beside it.

    Attributes:
        path: The file.
        format: What its sidecar says.

    Raises:
        CorpusError: If one of the two files is not there or malformed, or the file does not have
            the size that the sidecar says. `verify` compares every byte.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.format = TokenFormat.read(self.path)
        self._tokens = self._map()

    def __len__(self) -> int:
        return self.format.blocks

    def __repr__(self) -> str:
        """Say what it holds."""
        return f"<TokenMemmap {self.path}: {len(self)} blocks of {self.format.length} tokens>"

    def __getitem__(self, index: int) -> TokenBlock:
        """Return a block.

        Raises:
            IndexError: If there is none with that number.
            CorpusError: If a token id is outside the vocabulary.
        """
        number = position(index, len(self), f"{self.path} has {len(self)} blocks", backwards=True)
        start = number * self.format.length
        tokens = self._tokens[start : start + self.format.length].astype(np.int64)
        if (highest := int(tokens.max())) >= self.format.vocabulary:
            raise CorpusError(
                f"{self.path}: block {number} has the token id {highest}, outside the vocabulary "
                f"of {self.format.vocabulary}",
                reason="the file was altered, or its sidecar is another's",
            )
        return {"input_ids": torch.from_numpy(tokens), "sample_id": self.format.first_id + number}

    @property
    def ids(self) -> range:
        """The ids of all blocks."""
        return range(self.format.first_id, self.format.first_id + len(self))

    def by_id(self, sample: int) -> Tensor:
        """Return the tokens of the block with an id, int64 `[T]`.

        Raises:
            IndexError: If there is none.
        """
        if sample not in self.ids:
            raise IndexError(f"{self.path} has the ids {self.ids}, and not {sample}")
        return self[sample - self.format.first_id]["input_ids"]

    def verify(self) -> None:
        """Read the whole file, and compare it with the digest in its sidecar.

        Raises:
            CorpusError: If it is another.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while part := file.read(_PART):
                digest.update(part)
        if digest.hexdigest() != self.format.sha256:
            raise CorpusError(
                f"{self.path} was altered",
                reason=f"its SHA-256 is {digest.hexdigest()}, its sidecar has {self.format.sha256}",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "format": self.format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = self._map()

    def _map(self) -> np.ndarray:
        if not self.path.is_file():
            raise missing(self.path, self.path.parent)
        size = self.path.stat().st_size
        if size != self.format.bytes:
            raise CorpusError(
                f"{self.path} has {size} bytes, its sidecar says {self.format.bytes}",
                reason=f"{self.format.tokens} tokens of {self.format.dtype} were written; the file "
                "was cut off or altered, or the sidecar is another's",
            )
        dtype = DTYPES[self.format.dtype]
        if size == 0:  # which cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype, mode="r")
