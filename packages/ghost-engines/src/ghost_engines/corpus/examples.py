"""Records as samples of tokens: each by itself, or packed into blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ghost_core.arguments import whole
from ghost_engines.corpus.errors import CorpusError, position
from ghost_engines.corpus.forms import Form, TextTokens
from ghost_engines.corpus.records import Records
from ghost_engines.dataset import IGNORED

logger = logging.getLogger(__name__)

Example = dict[str, Tensor]
"""`input_ids`, int64 `[T]`, and `labels` if only some tokens of its form are part of the loss."""


class Examples(Dataset[Example]):
    """Each record as a sample, which is made when it is asked for.

    Args:
        records: The records.
        form: What they are.
        tokenizer: One of transformers.
        truncate: Tokens to take of each; what follows is left out.
        positions: Tokens that the model takes at most, if that is known.

    Raises:
        CorpusError: If there is no record.
    """

    def __init__(
        self,
        records: Records,
        form: Form,
        tokenizer: Any,
        *,
        truncate: int | None = None,
        positions: int | None = None,
    ) -> None:
        _check(records)
        self.records, self.form = records, form
        self._tokenizer, self._positions = tokenizer, positions
        if truncate is not None:
            truncate = whole("truncate", truncate, least=1, error=CorpusError)
        self._truncate = truncate

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """Return a sample.

        Raises:
            CorpusError: If the record has no such field or nothing to learn, or is longer than the
                model takes and nobody said that it may be cut.
        """
        what, found = self.records.called(index), self._tokens(index)
        instead = f", or pack all texts into blocks (--block {self._positions})"
        taken = found.taken(
            what, truncate=self._truncate, positions=self._positions, instead=instead
        )
        return _example(taken, self.form)

    def cut(self, rows: Iterable[int]) -> int:
        """Return how many of some samples are cut.

        Raises:
            CorpusError: If one cannot be read.
        """
        most = self._truncate
        return 0 if most is None else sum(len(self._tokens(row)) > most for row in rows)

    def _tokens(self, index: int) -> TextTokens:
        """Return all tokens of a record."""
        what = self.records.called(index)
        return self.form.tokens(self.records[index], self._tokenizer, what)

    def text(self, index: int) -> str:
        """Return a record as a text for people.

        Raises:
            IndexError: If there is none with that number.
            CorpusError: If it cannot be read.
        """
        at = position(index, len(self), f"there are {len(self)} samples")
        return self.form.shown(self.records[at], self.records.called(at))


class Blocks(Dataset[Example]):
    """All records, one after another, in blocks of T tokens.

    All are read at once, and their tokens are kept in memory. What does not fill a block at the
    end is left out, and that is logged.

    Args:
        records: The records.
        form: What they are.
        tokenizer: One of transformers, whose end token stands after each record.
        block: Tokens of a block.

    Raises:
        CorpusError: If there are not enough tokens for one, or a record cannot be read.
    """

    def __init__(self, records: Records, form: Form, tokenizer: Any, *, block: int) -> None:
        _check(records)
        self._form, self._tokenizer = form, tokenizer
        self._block = whole("block", block, least=2, error=CorpusError)
        ids, learnt = [], []
        for index in range(len(records)):
            found = form.tokens(records[index], tokenizer, records.called(index))
            ids.append(np.array(self._ended(found.ids), dtype=np.int64))
            end = [found.learnt[-1]] if found.ids and len(ids[-1]) > len(found) else []
            learnt.append(np.array(found.learnt + end, dtype=bool))
        self._ids, self._learnt = np.concatenate(ids), np.concatenate(learnt)
        if not len(self):
            raise CorpusError(f"{records.path} has {len(self._ids)} tokens, no block of {block}")
        if rest := len(self._ids) % self._block:
            logger.info("%s: the last %d tokens fill no block", records.path, rest)

    def __len__(self) -> int:
        return len(self._ids) // self._block

    def __getitem__(self, index: int) -> Example:
        """Return a block.

        Raises:
            IndexError: If there is none with that number.
        """
        at = position(index, len(self), f"there are {len(self)} blocks")
        part = slice(at * self._block, (at + 1) * self._block)
        return _example(
            TextTokens(self._ids[part].tolist(), self._learnt[part].tolist()), self._form
        )

    def text(self, index: int) -> str:
        """Return a block as a text for people."""
        return str(self._tokenizer.decode(self[index]["input_ids"].tolist()))

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or not ids or ids[-1] == end else [*ids, end]


def _check(records: Records) -> None:
    if not len(records):
        raise CorpusError(f"{records.path} has no text")


def _example(tokens: TextTokens, form: Form) -> Example:
    """Return a sample: of a form all have labels or none, since a batch has what all of it have."""
    ids = torch.tensor(tokens.ids, dtype=torch.int64)
    if form.whole:
        return {"input_ids": ids}
    return {"input_ids": ids, "labels": ids.masked_fill(~torch.tensor(tokens.learnt), IGNORED)}
