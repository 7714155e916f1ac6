"""How ghost computes: at least float32, without autocast and without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ghost_core.process import exact_products
from ghost_core.restoring import restored


def accumulation_dtype(*values: Tensor | torch.dtype) -> torch.dtype:
    """Return the dtype for products and sums: float32, or float64 if a tensor or dtype is."""
    dtypes = [value if isinstance(value, torch.dtype) else value.dtype for value in values]
    wide = torch.float64 in dtypes
    return torch.float64 if wide else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute without gradients, autocast, TF32 or reduced-precision float32 products.

    A product of bfloat16 tensors is up to 18 % off the dot that it stands for, so every factor is
    widened before it meets a direction, and the user's speed settings do not apply to the result.
    These settings are the whole process's: what other threads compute meanwhile is exact as well,
    and they are as the user chose them once no thread is inside.
    """
    with restored() as stack:
        stack.enter_context(exact_products())
        # Again, since modes that see every function see this one too, and may be interrupted.
        stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def chunks(n: int, elements_per_sample: int, limit: int = 2**25) -> Iterator[slice]:
    """Split n samples so that no intermediate holds more than about `limit` elements.

    Args:
        n: Number of samples.
        elements_per_sample: Elements that one sample adds to the intermediate.
        limit: Elements allowed at once; the default is 128 MiB of float32.

    Yields:
        Consecutive slices that cover `range(n)`; one empty slice if n is 0.
    """
    step = max(1, limit // max(1, elements_per_sample))
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))
