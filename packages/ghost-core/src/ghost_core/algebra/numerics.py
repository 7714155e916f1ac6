"""How ghost computes: at least float32, without autocast and without TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from ghost_core.process import exact_products, products_are_exact
from ghost_core.restoring import graphs_kept, restored

_Result = TypeVar("_Result")


def accumulation_dtype(*values: Tensor | torch.dtype) -> torch.dtype:
    """Return the dtype for products and sums: float32, or float64 if a tensor or dtype is."""
    for value in values:
        if (value if isinstance(value, torch.dtype) else value.dtype) is torch.float64:
            return torch.float64
    return torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Compute without gradients, autocast, TF32 or reduced-precision float32 products.

    A product of bfloat16 tensors is up to 18 % off the dot that it stands for, so every factor is
    widened before it meets a direction, and the user's speed settings do not apply to the result.
    These settings are the whole process's: what other threads compute meanwhile is exact as well,
    and they are as the user chose them once no thread is inside.
    """
    # It is entered for each call of a module, forward and backward: what is so is left alone.
    exact, grad = products_are_exact(device.type), torch.is_grad_enabled()
    autocast = torch.is_autocast_enabled(device.type)
    if exact and not grad and not autocast:
        return _AS_IT_IS
    if exact and not autocast:
        return graphs_kept(False)
    return _set_precisely(device, exact=exact, autocast=autocast)


def precisely(device: torch.device, function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function as inside of `full_precision`, which hardly ever has anything to set."""
    grad, kind = torch.is_grad_enabled(), device.type
    if not grad and products_are_exact(kind) and not torch.is_autocast_enabled(kind):
        return function(*args)
    with full_precision(device):
        return function(*args)


_AS_IT_IS = nullcontext()


@contextmanager
def _set_precisely(device: torch.device, *, exact: bool, autocast: bool) -> Iterator[None]:
    with restored() as stack:
        if not exact:
            stack.enter_context(exact_products())
        stack.enter_context(graphs_kept(False))
        if autocast:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


_MOST: ContextVar[int] = ContextVar("most elements at once", default=2**25)


@contextmanager
def building_at_most(size: int) -> Iterator[None]:
    """Let intermediates inside hold no more than about `size` bytes, but for those of one sample.

    Without it, the limit is 128 MiB.
    """
    before = _MOST.set(max(1, size // 4))
    try:
        yield
    finally:
        _MOST.reset(before)


def at_once(elements_per_sample: int, limit: int | None = None) -> int:
    """Return how many samples an intermediate may hold; see `chunks`."""
    most = _MOST.get() if limit is None else min(limit, _MOST.get())
    return max(1, most // max(1, elements_per_sample))


def chunks(n: int, elements_per_sample: int, limit: int | None = None) -> Iterator[slice]:
    """Split n samples so that no intermediate holds more than about `limit` elements.

    Args:
        n: Number of samples.
        elements_per_sample: Elements that one sample adds to the intermediate.
        limit: Elements allowed at once, if fewer than `building_at_most` says.

    Yields:
        Consecutive slices that cover `range(n)`; one empty slice if n is 0.
    """
    step = at_once(elements_per_sample, limit)
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))
