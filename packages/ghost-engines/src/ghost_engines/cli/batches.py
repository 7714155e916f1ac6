"""Makes the batch to verify a model on: texts, token ids, or what a function returns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function
from ghost_engines.cli.models import is_folder, load_tokenizer

BATCH_SIZE, TEXT_TOKENS = 16, 128


def load_batch(
    data: str,
    model: str,
    loaded: nn.Module,
    *,
    field: str = "text",
    batch_size: int | None = None,
    max_tokens: int | None = None,
) -> Any:
    """Load a batch.

    Args:
        data: A file of texts or token ids, or `module:function`.
        model: What the model was loaded from, for its tokenizer.
        loaded: The model, for its largest number of positions.
        field: Key of the text in lines of JSON.
        batch_size: Samples to take from a file.
        max_tokens: Tokens to take of each sample.

    Returns:
        For files, `input_ids` and `attention_mask`, int64 `[N, T]`; else what the function returns.

    Raises:
        CommandError: If there is no batch in it.
        MissingExtraError: If texts need transformers, and it is not installed.
    """
    for option, value in (("--batch-size", batch_size), ("--max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise CommandError(f"{option} must be at least 1, not {value}")
        if value is not None and ":" in data and not Path(data).exists():
            raise CommandError(f"{option} is for files: {data} decides itself")
    size = BATCH_SIZE if batch_size is None else batch_size
    match Path(data).suffix:
        case ".txt" | ".jsonl" as suffix:
            lines = _json_texts(Path(data), field) if suffix == ".jsonl" else _lines(Path(data))
            texts = list(itertools.islice(lines, size))
            return _tokenized(data, texts, model, _longest(loaded, max_tokens))
        case ".npy":
            return _padded(data, *_from_numpy(Path(data), size), max_tokens)
        case ".safetensors":
            return _padded(data, *_from_safetensors(Path(data), size), max_tokens)
    if ":" not in data:
        raise CommandError(
            f"--data: {data} is neither a .txt, .jsonl, .npy or .safetensors file nor "
            "module:function"
        )
    return find_function(data, "--data")()


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file that are not blank."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\r\n") for line in file if line.strip())
    except ValueError as error:
        raise CommandError(f"--data: {path} is not UTF-8: {error}") from error


def _json_texts(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CommandError(
                f"--data: text {number} of {path} is no JSON object with {field!r}; --field names "
                "the key of the text"
            ) from error
        if not isinstance(text, str):
            raise CommandError(
                f"--data: {field!r} of text {number} of {path} is a {type(text).__name__}, no text"
            )
        yield text


def _tokenized(data: str, texts: list[str], model: str, longest: int) -> dict[str, Tensor]:
    if not texts:
        raise CommandError(f"--data: {data} has no text")
    if not is_folder(model):
        raise CommandError(
            f"--data: {data} has texts, and only a checkpoint's folder has a tokenizer; {model} is "
            "none: give token ids"
        )
    tokenizer = load_tokenizer(Path(model))
    found = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {key: found[key].long() for key in ("input_ids", "attention_mask")}


def _longest(model: nn.Module, max_tokens: int | None) -> int:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    wanted = TEXT_TOKENS if max_tokens is None else max_tokens
    return min(wanted, positions) if isinstance(positions, int) and positions > 0 else wanted


def _from_numpy(path: Path, size: int) -> tuple[Tensor, None]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CommandError(f"--data: {path} is no array of numbers: {error}") from error
    if not isinstance(values, np.ndarray):
        raise CommandError(f"--data: {path} holds several arrays: give one, integers [N, T]")
    if values.dtype.kind not in "iu" or values.ndim != 2:
        raise CommandError(
            f"--data: {path} must hold token ids, integers [N, T], not {values.dtype} of shape "
            f"{values.shape}"
        )
    return torch.from_numpy(np.array(values[:size], dtype=np.int64)), None


def _from_safetensors(path: Path, size: int) -> tuple[Tensor, Tensor | None]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            key = "input_ids" if "input_ids" in names else names[0] if len(names) == 1 else None
            if key is None:
                raise CommandError(
                    f"--data: {path} must hold 'input_ids' or just one tensor, not "
                    f"{', '.join(names) or 'none'}"
                )
            ids = _first(file, key, size)
            mask = _first(file, "attention_mask", size) if "attention_mask" in names else None
    except SafetensorError as error:
        raise CommandError(f"--data: {path} cannot be read: {error}") from error
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.dim() != 2:
        kind = str(ids.dtype).removeprefix("torch.")
        raise CommandError(
            f"--data: {key!r} of {path} must be token ids, integers [N, T], not {kind} of shape "
            f"{tuple(ids.shape)}"
        )
    if mask is not None and mask.shape != ids.shape:
        raise CommandError(
            f"--data: 'attention_mask' of {path} has shape {tuple(mask.shape)}, 'input_ids' "
            f"{tuple(ids.shape)}"
        )
    if mask is not None and not mask.isfinite().all():
        raise CommandError(f"--data: 'attention_mask' of {path} is not finite")
    return ids.long(), mask


def _first(file: Any, name: str, size: int) -> Tensor:
    """Return the first samples of a tensor; one without axes has none."""
    piece = file.get_slice(name)
    found: Tensor = piece[:size] if piece.get_shape() else file.get_tensor(name)
    return found


def _padded(
    data: str, ids: Tensor, mask: Tensor | None, max_tokens: int | None
) -> dict[str, Tensor]:
    """Return token ids with an attention mask; where there is none, negative ids are padding."""
    if not ids.numel():
        raise CommandError(f"--data: {data} has no token")
    mask = (ids >= 0).long() if mask is None else (mask != 0).long()
    return {"input_ids": ids.clamp(min=0)[:, :max_tokens], "attention_mask": mask[:, :max_tokens]}
