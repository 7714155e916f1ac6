"""Files of texts and of token ids, from which batches are taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ghost_core.errors import told
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.models import is_folder, load_tokenizer
from ghost_engines.corpus import TEXT, CorpusError, NoRecordError, Records, Tokens, open_records
from ghost_engines.dataset import collated

_AT_ONCE = 1024
"""Samples that are checked together."""


class Source(ABC):
    """Samples of a file."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return samples as a batch: `input_ids` and `attention_mask`, int64 `[N, T]`.

        Raises:
            CommandError: If one is longer than the model takes and nobody said that it may be cut,
                or has no token to predict.
        """

    def check(self) -> None:
        """Refuse what `take` would, before any work is done.

        Raises:
            CommandError: As `take` does.
        """
        for start in range(0, len(self), _AT_ONCE):
            self.take(range(start, min(start + _AT_ONCE, len(self))))

    def cut(self, rows: Sequence[int]) -> str | None:
        """Say how many of some texts are cut, and to how many tokens; None if none is."""
        return None

    def text(self, row: int) -> str | None:
        """Return the text of a sample, if the file has texts."""
        return None


@dataclass(frozen=True)
class FileOptions:
    """How a file is read.

    Attributes:
        option: The option that names the file, for errors.
        model: What the model was loaded from, for its tokenizer.
        loaded: The model, for its largest number of positions.
        field: Key of the text in lines of JSON; "text" by default.
        truncate: Tokens to take of each sample; what is longer than the model takes is refused
            without it.
        unasked: Tokens to take of each text, and not more than the model takes, where `truncate` is
            not given: for a look at some of them.
    """

    option: str
    model: str
    loaded: nn.Module
    field: str | None
    truncate: int | None
    unasked: int | None = None

    @property
    def positions(self) -> int | None:
        """How many tokens the model takes at most, if it says so."""
        return positions_of(self.loaded)

    @property
    def text_tokens(self) -> int | None:
        """How many tokens of a text are taken; None for all."""
        if self.truncate is not None or self.unasked is None:
            return self.truncate
        return min(self.unasked, self.positions or self.unasked)


def open_source(path: Path, options: FileOptions, limit: int | None) -> Source | None:
    """Open a file of samples.

    Args:
        path: The file.
        options: How to read it.
        limit: How many texts to read at most; all of them by default.

    Returns:
        Its samples; None if it is of no kind that is known.

    Raises:
        CommandError: If there is no sample in it, or it cannot be read.
        MissingExtraError: If texts need transformers, and it is not installed.
    """
    try:
        match path.suffix:
            case ".txt" | ".jsonl":
                return _Texts.of(path, options, limit)
            case ".npy":
                return _from_numpy(path, options)
            case ".safetensors":
                return _from_safetensors(path, options)
    except OSError as error:
        why = error.strerror or error
        raise CommandError(f"{options.option}: {path} cannot be read: {why}") from error
    except CorpusError as error:
        raise CommandError(f"{options.option}: {error}") from error
    return None


# Texts


def given_texts(texts: Sequence[str], options: FileOptions) -> Source:
    """Return texts that were given themselves as samples.

    Raises:
        CommandError: If the model has no tokenizer.
        MissingExtraError: If transformers is not installed.
    """
    called = [f"text {at}" for at in range(1, len(texts) + 1)]
    return _Texts(list(texts), called, tokenizer_of(options.model, options.option), options)


@dataclass(frozen=True)
class _Texts(Source):
    texts: list[str]
    called: list[str]
    tokenizer: Any
    options: FileOptions

    @classmethod
    def of(cls, path: Path, options: FileOptions, limit: int | None) -> _Texts:
        records = open_records(path, limit)
        assert records is not None
        texts = [_text(records, at, options) for at in range(len(records))]
        if not texts:
            raise CommandError(f"{options.option}: {path} has no text")
        tokenizer = tokenizer_of(options.model, f"{options.option}: {path}")
        return cls(texts, [*map(records.called, range(len(texts)))], tokenizer, options)

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, row: int) -> str | None:
        return self.texts[row]

    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        most, positions = self.options.text_tokens, self.options.positions
        samples = []
        for row, ids in zip(rows, self._ids(rows), strict=True):
            all_ = Tokens(ids, [True] * len(ids))
            try:
                found = all_.taken(self.called[row], truncate=most, positions=positions)
            except CorpusError as error:
                raise CommandError(f"{self.options.option}: {error}") from error
            tokens = torch.tensor(found.ids)
            samples.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        batch: dict[str, Tensor] = collated(samples)
        return batch

    def cut(self, rows: Sequence[int]) -> str | None:
        most = self.options.text_tokens
        if most is None or not (cut := sum(len(ids) > most for ids in self._ids(rows))):
            return None
        return f"cut to {most}: {cut} of {len(rows)}"

    def _ids(self, rows: Sequence[int]) -> list[list[int]]:
        found = self.tokenizer([self.texts[row] for row in rows], verbose=False)
        return [list(ids) for ids in found["input_ids"]]


def _text(records: Records, index: int, options: FileOptions) -> str:
    field = (options.field or TEXT) if records.path.suffix == ".jsonl" else TEXT
    try:
        text = records[index][field]
    except (NoRecordError, KeyError) as error:
        raise CommandError(
            f"{options.option}: {records.called(index)} is no JSON object with {field!r}; --field "
            "names the key of the text"
        ) from error
    except CorpusError as error:
        raise CommandError(f"{options.option}: {error}") from error
    if not isinstance(text, str):
        raise CommandError(
            f"{options.option}: {field!r} of {records.called(index)} is a {type(text).__name__}, "
            "no text"
        )
    return text


def tokenizer_of(model: str, what: str) -> Any:
    """Return the tokenizer of a checkpoint, for texts.

    Args:
        model: What the model was loaded from.
        what: Where the texts are, for the error.

    Raises:
        CommandError: If it has none.
        MissingExtraError: If transformers is not installed.
    """
    if not is_folder(model):
        raise CommandError(
            f"{what} has texts, and only a checkpoint's folder has a tokenizer; {model} is none: "
            "give token ids"
        )
    return load_tokenizer(Path(model))


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens a model takes at most, if it says so."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


# Token ids


@dataclass(frozen=True)
class _Tokens(Source):
    """Token ids `[N, T]` on disk; where there is no mask, negative ids are padding."""

    what: str
    n: int
    ids: Callable[[Sequence[int]], Tensor]
    mask: Tensor | None
    truncate: int | None

    def __len__(self) -> int:
        return self.n

    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        ids = self.ids(rows)[:, : self.truncate]
        if self.mask is None:
            mask = ids >= 0
        else:
            mask = self.mask[list(rows), : self.truncate]
            if not mask.isfinite().all():
                raise CommandError(f"{self.what}: 'attention_mask' is not finite")
            mask = mask != 0
        predicted = (mask[:, 1:] & mask[:, :-1]).any(1)
        if not predicted.all():
            row = rows[int(predicted.logical_not().nonzero()[0])]
            raise CommandError(
                f"{self.what}: row {row} has no token to predict",
                reason="no two tokens of it stand beside each other",
                remedy="leave it out of the data, or take more tokens",
            )
        return {"input_ids": ids.clamp(min=0), "attention_mask": mask.long()}


def _from_numpy(path: Path, options: FileOptions) -> Source:
    what = f"{options.option}: {path}"
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a broken header is found out in many ways
        raise CommandError(f"{what} is no array of numbers: {told(error)}") from error
    if not isinstance(values, np.ndarray):
        raise CommandError(f"{what} holds several arrays: give one, integers [N, T]")
    if values.dtype.kind not in "iu" or values.ndim != 2:
        raise CommandError(
            f"{what} must hold token ids, integers [N, T], not {values.dtype} of shape "
            f"{values.shape}"
        )
    _check_any(values.size, what)

    def ids(rows: Sequence[int]) -> Tensor:
        found = values[list(rows)]
        _check_size(int(found.max()), what)
        return torch.from_numpy(found.astype(np.int64))

    return _Tokens(what, len(values), ids, None, options.truncate)


def _from_safetensors(path: Path, options: FileOptions) -> Source:
    what = f"{options.option}: {path}"
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            key = "input_ids" if "input_ids" in names else names[0] if len(names) == 1 else None
            if key is None:
                raise CommandError(
                    f"{what} must hold 'input_ids' or just one tensor, not "
                    f"{', '.join(names) or 'none'}"
                )
            values: Tensor = file.get_tensor(key)
            mask = file.get_tensor("attention_mask") if "attention_mask" in names else None
    except SafetensorError as error:
        raise CommandError(f"{what} cannot be read: {error}") from error
    if values.dtype.is_floating_point or values.dtype == torch.bool or values.dim() != 2:
        kind = str(values.dtype).removeprefix("torch.")
        raise CommandError(
            f"{options.option}: {key!r} of {path} must be token ids, integers [N, T], not {kind} "
            f"of shape {tuple(values.shape)}"
        )
    if mask is not None and mask.shape != values.shape:
        raise CommandError(
            f"{options.option}: 'attention_mask' of {path} has shape {tuple(mask.shape)}, "
            f"'input_ids' {tuple(values.shape)}"
        )
    _check_any(values.numel(), what)

    def ids(rows: Sequence[int]) -> Tensor:
        found = values[list(rows)]
        _check_size(int(found.cpu().numpy().max()), what)
        return found.long()

    return _Tokens(what, len(values), ids, mask, options.truncate)


def _check_size(largest: int, what: str) -> None:
    if largest > torch.iinfo(torch.int64).max:
        raise CommandError(f"{what} has the id {largest}, which does not fit into int64")


def _check_any(count: int, what: str) -> None:
    if not count:
        raise CommandError(f"{what} has no token")
