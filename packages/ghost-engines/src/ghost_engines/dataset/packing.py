"""Puts samples of like length into batches under a budget of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ghost_core import CaptureError


def packed(lengths: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """Return the positions of samples that belong together, the longest first.

    Args:
        lengths: Tokens of each sample.
        budget: Tokens of a batch at most, when each sample is padded to its longest one. A sample
            that is longer is alone.
        most: Samples of a batch at most.
    """
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    batches: list[list[int]] = []
    for at in order:
        # The first one of a batch is its longest.
        last = batches[-1] if batches else []
        if last and len(last) < most and (len(last) + 1) * lengths[last[0]] <= budget:
            last.append(at)
        else:
            batches.append([at])
    return batches


def token_count(sample: Any) -> int:
    """Return how many tokens a sample has: the length of its `input_ids`, or its own.

    Raises:
        CaptureError: If it has none.
    """
    found = sample.get("input_ids") if isinstance(sample, Mapping) else sample
    if isinstance(found, Tensor | np.ndarray) and found.ndim:
        return int(found.shape[0])
    if isinstance(found, list) and all(isinstance(each, int) for each in found):
        return len(found)
    raise CaptureError(
        f"nobody knows how many tokens a sample of type {type(sample).__name__} has",
        reason="it has no 'input_ids', and is no tensor of tokens",
        remedy="say so with length=..., a function of the sample, or leave tokens_per_batch out",
    )
