"""Text to token ids and back: the vocabulary that ships with the examples, or one on disk."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer

from ghost_engines import CorpusError
from ghost_examples.texts import build_vocabulary

EMBEDDED = "embedded"
"""The vocabulary and the texts that ship with the examples, by name."""

_NUL = 0  # a byte that texts do not have


class Tokenizer(Protocol):
    """What text is cut with.

    Attributes:
        name: Where it is: "embedded", or a folder.
        size: Number of token ids.
        end: The id that ends a document; None if it has none.
    """

    name: str
    size: int
    end: int | None

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text, and none besides."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids."""


class EmbeddedTokenizer:
    """The vocabulary that is counted from the texts that ship with the examples."""

    def __init__(self) -> None:
        self._vocabulary = build_vocabulary()
        self.name = EMBEDDED
        self.size = self._vocabulary.size
        self.end: int | None = _NUL

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text."""
        return self._vocabulary.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids."""
        return self._vocabulary.decode(tokens)


class PretrainedTokenizer:
    """A tokenizer of transformers in a folder. Nothing is downloaded.

    Args:
        folder: What `save_pretrained` has written.

    Raises:
        CorpusError: If there is no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CorpusError(
                f"there is no tokenizer in {folder}: there is no such folder",
                remedy=f"give a folder with tokenizer.json, or {EMBEDDED!r}",
            )
        load: Any = AutoTokenizer.from_pretrained
        try:
            self._inner = load(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            names = ", ".join(sorted(each.name for each in folder.iterdir())[:20]) or "nothing"
            raise CorpusError(
                f"the tokenizer in {folder} cannot be read: {error}",
                reason=f"the folder has {names}",
                remedy=f"give a folder that save_pretrained has written, or {EMBEDDED!r}",
            ) from error
        self._inner.model_max_length = 1 << 60  # blocks are cut here: no warning of long texts
        self.name = str(folder.absolute())
        self.size = len(self._inner)
        self.end: int | None = self._inner.eos_token_id

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids."""
        return str(self._inner.decode(list(tokens)))


@functools.cache
def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a name: "embedded", or a folder.

    Raises:
        CorpusError: If there is none.
    """
    return EmbeddedTokenizer() if name == EMBEDDED else PretrainedTokenizer(Path(name))
