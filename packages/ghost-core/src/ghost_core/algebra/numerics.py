"""How ghost computes: at least float32, without autocast and without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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
    """
    with restored() as stack:
        stack.enter_context(_exact_products())
        # Again, since modes that see every function see this one too, and may be interrupted.
        stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _precision_settings() -> tuple[Any, ...]:
    """Return torch's switches for float32 products, from torch 2.9 on."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


@contextmanager
def _exact_products() -> Iterator[None]:
    if not hasattr(torch.backends.cudnn, "conv"):
        with _exact_products_before_2_9():
            yield
        return
    # Reading the older settings is an error once the newer ones were used; this way both work.
    settings = _precision_settings()
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextmanager
def _exact_products_before_2_9() -> Iterator[None]:
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


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
