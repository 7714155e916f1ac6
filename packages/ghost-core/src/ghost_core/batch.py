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

    @property
    def n(self) -> int:
        """Number of samples N."""
        return len(self.ids)

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
    if isinstance(ids, Sequence) and any(isinstance(sample, str) for sample in ids):
        raise CaptureError("ids must be one integer per sample, not strings")
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(f"ids must be one integer per sample: {error}") from error
    if tensor.numel() == 0 and tensor.dim() == 1:
        return tensor.to("cpu", torch.int64)
    wrong = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    if tensor.dtype == torch.uint64 and tensor.numel():
        wrong = wrong or int(tensor.cpu().numpy().max()) > torch.iinfo(torch.int64).max
    if tensor.dim() != 1 or wrong:
        raise CaptureError(
            f"ids must be one integer per sample, not {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor.to("cpu", torch.int64, copy=True)
