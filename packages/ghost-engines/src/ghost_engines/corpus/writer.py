"""Writes tokens to a file for `TokenMemmap`, bit by bit, so that it is there as a whole or not."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from torch import Tensor

from ghost_core.arguments import whole
from ghost_engines.corpus.errors import CorpusError
from ghost_engines.corpus.sidecar import DTYPES, TokenFormat, largest
from ghost_engines.files import make_root, written_atomically


class TokenWriter:
    """Writes the tokens of a domain, in a `with` block.

    Tokens go to the disk as they come. The file and its sidecar are there once the block ends; if
    it ends with an exception, neither is. The sidecar comes last: a file without one was never
    finished, and is replaced.

    Args:
        path: The file, as `token_path(folder, split, domain)` names it. Folders are made.
        vocabulary: Number of token ids. Up to 65,536 are stored as uint16, more as uint32.
        length: Tokens of a block.
        first_id: Sample id of the first block: `domain_number(...) * BLOCKS_PER_DOMAIN`.
        tokenizer: Where the tokenizer is.

    Raises:
        CorpusError: If a number cannot be one, or the file is there already.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocabulary: int,
        length: int,
        first_id: int = 0,
        tokenizer: str = "",
    ) -> None:
        self.path = Path(path)
        self._vocabulary = whole("vocabulary", vocabulary, least=1, error=CorpusError)
        self._length = whole("length", length, least=1, error=CorpusError)
        self._first_id = whole("first_id", first_id, least=0, error=CorpusError)
        self._tokenizer = tokenizer
        fitting = [name for name in DTYPES if self._vocabulary <= largest(name) + 1]
        if not fitting:
            raise CorpusError(f"a vocabulary of {vocabulary} does not fit into {[*DTYPES][-1]}")
        self._dtype = fitting[0]
        if self.path.suffix != ".bin":
            raise CorpusError(f"{path} must end in .bin: see token_path(folder, split, domain)")
        if self.path.with_suffix(".json").exists():
            raise CorpusError(
                f"{self.path} is there already, with its sidecar",
                remedy="remove both files first, or write to another folder",
            )
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._open: contextlib.ExitStack | None = None
        self._file: BinaryIO | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return self._tokens

    def __enter__(self) -> Self:
        make_root(self.path.parent)
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(written_atomically(self.path))
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._open is not None
        self._file = None
        self._open.__exit__(*exception)  # type: ignore[arg-type]  # what a `with` block hands on
        if exception[0] is None:
            self._sidecar().write(self.path)

    def append(self, tokens: Iterable[int] | np.ndarray | Tensor) -> None:
        """Write more tokens.

        Raises:
            CorpusError: If an id is outside the vocabulary or no whole number, or the `with` block
                has not begun or has ended. Then none of these tokens is written.
        """
        if self._file is None:
            raise CorpusError("tokens are appended inside of the `with` block of a TokenWriter")
        if not isinstance(tokens, np.ndarray | Tensor):
            tokens = list(tokens)
        ids = np.asarray(tokens)
        if ids.size == 0:
            return
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise CorpusError(
                f"tokens must be a row of whole numbers, not {ids.dtype} {list(ids.shape)}"
            )
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self._vocabulary:
            raise CorpusError(
                f"token id {lowest if lowest < 0 else highest} is outside the vocabulary of "
                f"{self._vocabulary}, for {self.path}",
                reason="a model has no row for it in its embedding",
                remedy="give the size of the tokenizer's whole vocabulary, added tokens included",
            )
        data = ids.astype(DTYPES[self._dtype]).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += ids.size

    def _sidecar(self) -> TokenFormat:
        return TokenFormat(
            dtype=self._dtype,
            vocabulary=self._vocabulary,
            length=self._length,
            tokens=self._tokens,
            first_id=self._first_id,
            tokenizer=self._tokenizer,
            sha256=self._digest.hexdigest(),
        )
