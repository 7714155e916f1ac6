"""Which sample each row belongs to, where rows are not samples one by one."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ghost_core.errors import CaptureError


class Fold(Enum):
    """How `n · k` rows belong to n samples."""

    SAMPLE_MAJOR = "sample-major"
    """k rows of the first sample, then k of the second: `[N, k, ...]` flattened."""
    SAMPLE_MINOR = "sample-minor"
    """One row of each sample, then the next of each: `[k, N, ...]` flattened."""

    def owners(self, n: int, rows: int) -> Tensor:
        """Return the sample that each row belongs to, int64 `[rows]`."""
        index = torch.arange(rows)
        return index // (rows // n) if self is Fold.SAMPLE_MAJOR else index % n


def find_owner(
    key: str, given: Mapping[str, Tensor], inputs: Mapping[str, Any], samples: slice
) -> Tensor:
    """Return the sample in a pass that each row belongs to, int64 `[R]`.

    Args:
        key: The key of the tensor that tells.
        given: What the batch was opened with; positions of samples in the batch.
        inputs: The model's keyword inputs; positions of samples in the pass.
        samples: The pass's part of the batch.

    Raises:
        CaptureError: If there is no such tensor or it does not hold positions of samples.
    """
    owner = given[key] if key in given else inputs.get(key)
    if owner is not None and not isinstance(owner, Tensor):
        raise CaptureError(f"row_owner: {key!r} is a {type(owner).__name__}: give a tensor")
    if owner is None:
        listed = ", ".join(map(repr, given)) or "none"
        raise CaptureError(
            f"row_owner: there is no tensor {key!r} that tells the sample of each row, neither in "
            f"engine.batch(ids, owners={{{key!r}: ...}}), or verify(..., owners=...), which has "
            f"{listed}, nor among the model's keyword inputs"
        )
    if owner.dim() != 1 or owner.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise CaptureError(
            f"row_owner: {key!r} must be signed integers [R], not {owner.dtype} of shape "
            f"{tuple(owner.shape)}"
        )
    owner = owner.detach().long()
    if key in given:
        owner = owner[(owner >= samples.start) & (owner < samples.stop)] - samples.start
    n = samples.stop - samples.start
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < n:
        raise CaptureError(
            f"row_owner: {key!r} must hold positions of samples, from 0 to {n - 1}, not from "
            f"{int(owner.min())} to {int(owner.max())}"
        )
    return owner
