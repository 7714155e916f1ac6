"""Makes batches of samples: of tokens with padding, of anything else as torch does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ghost_core import CaptureError

IGNORED = -100
"""The label of a token that is no part of the loss."""


def collated(samples: list[Any]) -> Any:
    """Return a batch: samples with `input_ids` are padded, others go to torch's own collate.

    Rows of tokens are padded at their ends: `labels` with -100, others with 0. Where they are not
    of one length and have no `attention_mask`, they get one.

    Raises:
        CaptureError: If samples with `input_ids` have other fields than each other.
    """
    if not all(isinstance(sample, Mapping) and "input_ids" in sample for sample in samples):
        return default_collate(samples)
    _check_fields(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    if len(set(lengths)) == 1:
        return default_collate([_as_tensors(sample) for sample in samples])
    longest = max(lengths)
    batch = {
        name: _padded([sample[name] for sample in samples], lengths, longest, name)
        for name in samples[0]
    }
    if "attention_mask" not in batch:
        places = torch.arange(longest)
        batch["attention_mask"] = (places < torch.tensor(lengths)[:, None]).long()
    return batch


def _check_fields(samples: list[Mapping[str, Any]]) -> None:
    """Refuse samples of which some would lose a field: those of the first one make the batch."""
    for sample in samples:
        if other := sorted(map(str, sample.keys() ^ samples[0].keys())):
            raise CaptureError(
                f"of two samples in a batch, only one has {', '.join(other)}",
                reason="a batch has the fields that all of its samples have",
                remedy="give all samples the same fields, as labels to all or to none",
            )


def _as_tensors(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: torch.tensor(value) if _is_row(value) else value for name, value in sample.items()
    }


def _is_row(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int | float) for each in value)


def _padded(values: list[Any], lengths: list[int], longest: int, name: str) -> Any:
    rows = [torch.tensor(value) if _is_row(value) else value for value in values]
    alike = all(
        isinstance(row, Tensor) and row.dim() == 1 and len(row) == length
        for row, length in zip(rows, lengths, strict=True)
    )
    if not alike:
        return default_collate(rows)
    padding = IGNORED if name == "labels" else 0
    return torch.stack(
        [torch.nn.functional.pad(row, (0, longest - len(row)), value=padding) for row in rows]
    )
