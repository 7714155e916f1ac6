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
from ghost_engines.corpus import TEXT, CorpusError, NoRecordError, Records, open_records

TEXT_TOKENS = 128


class Source(ABC):
    """Samples of a file."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return samples as a batch: `input_ids` and `attention_mask`, int64 `[N, T]`."""

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
        max_tokens: Tokens to take of each sample.
    """

    option: str
    model: str
    loaded: nn.Module
    field: str | None
    max_tokens: int | None


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


@dataclass(frozen=True)
class _Texts(Source):
    texts: list[str]
    tokenizer: Any
    longest: int

    @classmethod
    def of(cls, path: Path, options: FileOptions, limit: int | None) -> _Texts:
        records = open_records(path, limit)
        assert records is not None
        texts = [_text(records, at, options) for at in range(len(records))]
        if not texts:
            raise CommandError(f"{options.option}: {path} has no text")
        tokenizer = tokenizer_of(options.model, f"{options.option}: {path}")
        return cls(texts, tokenizer, _longest(options.loaded, options.max_tokens))

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, row: int) -> str | None:
        return self.texts[row]

    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        found = self.tokenizer(
            [self.texts[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        )
        return {key: found[key].long() for key in ("input_ids", "attention_mask")}


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


def _longest(model: nn.Module, max_tokens: int | None) -> int:
    positions = positions_of(model)
    wanted = TEXT_TOKENS if max_tokens is None else max_tokens
    return wanted if positions is None else min(wanted, positions)


# Token ids


@dataclass(frozen=True)
class _Tokens(Source):
    """Token ids `[N, T]` on disk; where there is no mask, negative ids are padding."""

    what: str
    n: int
    ids: Callable[[Sequence[int]], Tensor]
    mask: Tensor | None
    max_tokens: int | None

    def __len__(self) -> int:
        return self.n

    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        ids = self.ids(rows)[:, : self.max_tokens]
        if self.mask is None:
            mask = ids >= 0
        else:
            mask = self.mask[list(rows), : self.max_tokens]
            if not mask.isfinite().all():
                raise CommandError(f"{self.what}: 'attention_mask' is not finite")
            mask = mask != 0
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

    return _Tokens(what, len(values), ids, None, options.max_tokens)


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

    return _Tokens(what, len(values), ids, mask, options.max_tokens)


def _check_size(largest: int, what: str) -> None:
    if largest > torch.iinfo(torch.int64).max:
        raise CommandError(f"{what} has the id {largest}, which does not fit into int64")


def _check_any(count: int, what: str) -> None:
    if not count:
        raise CommandError(f"{what} has no token")
