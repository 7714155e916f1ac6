"""Batches of the data that a command is given, for commands that write no store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ghost_engines.cli.corpora import Corpus, CorpusOptions, load_corpus
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.token_files import TokenRows
from ghost_engines.corpus import CorpusError, Examples, Mixture
from ghost_engines.dataset import collated
from ghost_engines.ids import ID_FIELD

BATCH_SIZE = 16

TEXT_TOKENS = 128
"""Tokens of a text that are looked at where nobody said how many."""


@dataclass(frozen=True)
class Sample:
    """A batch to look at.

    Attributes:
        batch: For files, `input_ids` and `attention_mask`, int64 `[N, T]`, and `labels` where not
            all tokens are part of the loss; else what the function returns.
        cut: How many of its texts are cut, and to how many tokens; None if none is.
    """

    batch: Any
    cut: str | None = None


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        batches: For files, a loader of batches as `Sample` has one, in their order, with ids where
            samples have their own; else what the function returns.
        domains: Returns the name of the domain of each sample, by ids int64 `[n]`; None if there
            are no domains.
    """

    batches: Any
    domains: Callable[[Tensor], list[str]] | None = None


def load_batch(
    options: CorpusOptions, loaded: nn.Module, *, batch_size: int | None = None
) -> Sample:
    """Load one batch, to look at.

    Args:
        options: How data are read; of a text, 128 tokens are taken where they do not say how many,
            and not more than the model takes.
        loaded: The model, for its largest number of positions.
        batch_size: Samples to take from a file.

    Raises:
        CommandError: If there is no batch in it, or a sample cannot be taken.
        MissingExtraError: If a library for it is not installed.
    """
    if batch_size is not None and batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, not {batch_size}")
    size = BATCH_SIZE if batch_size is None else batch_size
    corpus = load_corpus(options, loaded, limit=size, unasked=TEXT_TOKENS)
    if corpus.made:
        if batch_size is not None:
            raise CommandError(f"--batch-size is for files: {options.data} decides itself")
        return Sample(corpus.samples)
    rows = range(min(size, len(corpus.samples)))
    batch = batch_of(corpus, options, rows)
    texts = corpus.samples
    cut = texts.cut(rows) if isinstance(texts, Examples) else 0
    longest = batch["input_ids"].shape[1]
    return Sample(batch, f"cut to {longest}: {cut} of {len(rows)}" if cut else None)


def load_data(options: CorpusOptions, loaded: nn.Module, *, batch_size: int) -> Data:
    """Load a data set.

    Args:
        options: How data are read.
        loaded: The model, for its largest number of positions.
        batch_size: Samples in a batch of a file.

    Raises:
        CommandError: If there is no sample in it, or one cannot be taken.
        MissingExtraError: If a library for it is not installed.
    """
    corpus = load_corpus(options, loaded)
    if corpus.made:
        return Data(corpus.samples)
    _check(corpus.samples, options)
    batches = DataLoader(
        corpus.samples,
        batch_size=batch_size,
        collate_fn=_with_masks,
        generator=torch.Generator(),
    )
    _, domains = corpus.columns.get("group", ("", None))
    return Data(batches, domains)


def batch_of(corpus: Corpus, options: CorpusOptions, rows: Sequence[int]) -> dict[str, Any]:
    """Return some samples of files as a batch, without ids.

    Raises:
        CommandError: If one cannot be taken.
    """
    try:
        batch = _with_masks([corpus.samples[row] for row in rows])
    except CorpusError as error:
        raise CommandError(f"{options.option}: {error}") from error
    batch.pop(ID_FIELD, None)
    return batch


def _with_masks(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch, always with a mask, which a model or loss may ask for."""
    batch: dict[str, Any] = collated(
        [{"attention_mask": torch.ones_like(each["input_ids"]), **each} for each in samples]
    )
    return batch


def _check(samples: Any, options: CorpusOptions) -> None:
    """Take each sample of files of records or rows once, so that none is refused in the middle."""
    if isinstance(samples, TokenRows):
        samples.check()
    elif isinstance(samples, Examples | Mixture):
        try:
            for row in range(len(samples)):
                samples[row]
        except CorpusError as error:
            raise CommandError(f"{options.option}: {error}") from error
