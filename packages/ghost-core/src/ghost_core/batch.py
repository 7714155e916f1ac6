"""A batch of samples and its ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ghost_core.errors import CaptureError

ResultT = TypeVar("ResultT")

SampleIds = Sequence[int] | Tensor | np.ndarray


class Batch(Generic[ResultT]):
    """A batch of samples on its way through an engine.

    Attributes:
        ids: The samples' ids, int64 `[N]`.
        verified: Whether the split by sample was verified on this model.
    """

    def __init__(self, ids: Tensor, verified: bool) -> None:
        self.ids = ids
        self.verified = verified
        self._results: list[ResultT] = []

    def __repr__(self) -> str:
        """Say how many samples it has, and what came of it."""
        result = repr(self._results[0]) if self._results else "no result"
        return f"<{type(self).__name__}: N={self.n}, {result}>"

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.ids.size(0)

    @property
    def result(self) -> ResultT:
        """What the engine made of the batch.

        Raises:
            CaptureError: If the batch is still open, or an exception ended it.
        """
        if not self._results:
            raise CaptureError(
                "the batch has no result: it is still open (read results after the with block), or "
                "an exception ended it"
            )
        return self._results[0]

    def finish(self, result: ResultT) -> None:
        """Set the result."""
        self._results[:] = [result]


def as_ids(ids: SampleIds) -> Tensor:
    """Return sample ids as int64 `[N]` on the CPU.

    Raises:
        CaptureError: If they are not one integer per sample.
    """
    if isinstance(ids, range) and _MIN <= ids.start <= _MAX and _MIN <= ids.stop <= _MAX:
        return torch.arange(ids.start, ids.stop, ids.step, device="cpu")
    if isinstance(ids, Sequence):
        if any(isinstance(sample, str) for sample in ids):
            raise _no_ids(", not strings")
        ids = [int(each) if isinstance(each, np.integer) else each for each in ids]
        if any(_is_bool(each) for each in ids):  # of which torch makes 1 and 0 beside integers
            raise _no_ids(", not True or False")
        if any(isinstance(each, int) and not _MIN <= each <= _MAX for each in ids):
            raise _too_large()
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_ids(f", not a {type(ids).__name__}", str(error)) from error
    if tensor.is_meta or tensor.is_sparse:
        raise _no_ids(", not a tensor that is sparse or on meta")
    if tensor.numel() == 0 and tensor.dim() == 1:
        return tensor.to("cpu", torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise _no_ids(f", not {tensor.dtype} of shape {tuple(tensor.shape)}")
    if tensor.dim() == 0:
        raise _no_ids(f", not the number {tensor.item()}", remedy=f"range({tensor.item()})")
    if tensor.dim() != 1:
        raise _no_ids(f", not {tensor.dtype} of shape {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint64 and int(tensor.cpu().numpy().max()) > _MAX:
        raise _too_large()
    return tensor.to("cpu", torch.int64, copy=True)


_MIN, _MAX = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool)


def _no_ids(
    found: str, reason: str = "results are told apart by the ids of the samples", remedy: str = ""
) -> CaptureError:
    """Say what was given in place of ids."""
    return CaptureError(
        f"ids must be one integer per sample{found}",
        reason=reason,
        remedy=f"give integers [N], such as {remedy or 'range(len(batch))'}",
    )


def _too_large() -> CaptureError:
    """Say that an id is too large."""
    return CaptureError(
        "ids must be one integer per sample that fits into int64",
        reason="one of them does not, and another number would be stored for it",
        remedy="give each sample's position in the data instead, and keep a table of the names",
    )
