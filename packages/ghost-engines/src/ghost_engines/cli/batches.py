"""Finds the data that a command is given: texts, token ids, or what a function returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function
from ghost_engines.cli.sources import FileOptions, Source, open_source

BATCH_SIZE = 16

TEXT_TOKENS = 128
"""Tokens of a text that are looked at where nobody said how many."""


@dataclass(frozen=True)
class Sample:
    """A batch to look at.

    Attributes:
        batch: For files, `input_ids` and `attention_mask`, int64 `[N, T]`; else what the function
            returns.
        cut: How many of its texts are cut, and to how many tokens; None if none is.
    """

    batch: Any
    cut: str | None = None


def load_batch(
    data: str,
    model: str,
    loaded: nn.Module,
    *,
    field: str | None = None,
    batch_size: int | None = None,
    truncate: int | None = None,
) -> Sample:
    """Load one batch, to look at.

    Args:
        data: A file of texts or token ids, or `module:function`.
        model: What the model was loaded from, for its tokenizer.
        loaded: The model, for its largest number of positions.
        field: Key of the text in lines of JSON; "text" by default.
        batch_size: Samples to take from a file.
        truncate: Tokens to take of each sample; by default 128 of a text, and not more than the
            model takes.

    Raises:
        CommandError: If there is no batch in it, or as `Source.take` does.
        MissingExtraError: If texts need transformers, and it is not installed.
    """
    _check(data, {"--batch-size": batch_size})
    check_field(field, [data])
    size = BATCH_SIZE if batch_size is None else batch_size
    options = FileOptions("--data", model, loaded, field, truncate, TEXT_TOKENS)
    found = find_data(data, options, limit=size)
    if not isinstance(found, Source):
        return Sample(found())
    rows = range(min(size, len(found)))
    return Sample(found.take(rows), found.cut(rows))


def load_data(
    data: str,
    option: str,
    model: str,
    loaded: nn.Module,
    *,
    field: str | None,
    batch_size: int,
    truncate: int | None,
) -> Any:
    """Load a data set.

    Args:
        data: A file of texts or token ids, or `module:function`.
        option: The option that names it, for errors.
        model: What the model was loaded from, for its tokenizer.
        loaded: The model, for its largest number of positions.
        field: Key of the text in lines of JSON; "text" by default.
        batch_size: Samples in a batch of a file.
        truncate: Tokens to take of each sample; by default all.

    Returns:
        For files, a loader of batches as `load_batch` makes them, in the order of the file; else
        what the function returns.

    Raises:
        CommandError: If there is no sample in it, or as `Source.take` does.
        MissingExtraError: If texts need transformers, and it is not installed.
    """
    options = FileOptions(option, model, loaded, field, truncate)
    found = find_data(data, options)
    if not isinstance(found, Source):
        return found()
    found.check()
    return DataLoader(
        range(len(found)),  # type: ignore[arg-type]  # it has a length and items
        batch_size=batch_size,
        collate_fn=found.take,
        generator=torch.Generator(),
    )


def check_field(field: str | None, data: Iterable[str]) -> None:
    """Refuse a key of texts where there are no lines of JSON.

    Args:
        field: The key, if one was given.
        data: All that was given as data.

    Raises:
        CommandError: If nobody would look for it.
    """
    if field is not None and not any(Path(each).suffix == ".jsonl" for each in data):
        raise CommandError(f"--field is for .jsonl files, and {', '.join(data)} is none")


def _check(data: str, numbers: dict[str, int | None]) -> None:
    """Refuse numbers below 1, and those that a function does not know of."""
    for option, value in numbers.items():
        if value is not None and value < 1:
            raise CommandError(f"{option} must be at least 1, not {value}")
        if value is not None and ":" in data and not Path(data).exists():
            raise CommandError(f"{option} is for files: {data} decides itself")


def find_data(data: str, options: FileOptions, limit: int | None = None) -> Any:
    """Return the samples of a file, or the function that is named.

    Args:
        data: A file of texts or token ids, or `module:function`.
        options: How to read a file.
        limit: How many texts to read at most; all of them by default.

    Raises:
        CommandError: If it is neither.
        MissingExtraError: If texts need transformers, and it is not installed.
    """
    _check(data, {"--truncate": options.truncate})
    if (source := open_source(Path(data), options, limit)) is not None:
        return source
    if ":" not in data:
        raise CommandError(
            f"{options.option}: {data} is neither a .txt, .jsonl, .npy or .safetensors file nor "
            "module:function"
        )
    return find_function(data, options.option)
