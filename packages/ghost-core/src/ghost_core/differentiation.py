"""Differentiates for parameters alone, past a call that makes torch end the process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ghost_core._torch import DispatchMode, is_reentrant, reentrant_behind
from ghost_core.errors import CaptureError

_MASK = -1  # the last argument of the operation says which gradients it makes


class _WithInput(DispatchMode):
    """Has the gradient of its input made, too, by group norms.

    Without it and without one of a bias, torch writes to where no memory is if the input is
    channels-last, on CPU. Seen in torch 2.13.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func is not torch.ops.aten.native_group_norm_backward.default or args[_MASK][0]:
            return func(*args, **(kwargs or {}))
        _, weight, bias = func(*args[:_MASK], [True, *args[_MASK][1:]])
        return None, weight, bias


def check_differentiable(value: Tensor) -> None:
    """Refuse a graph of which torch sees a part only, where it differentiates for some tensors.

    Parameters inside of a reentrant checkpoint would have no gradient, or torch's error speaks of
    calls that users have not made.

    Raises:
        CaptureError: If the graph has one.
    """
    if reentrant_behind(value.grad_fn):
        raise _reentrant()


@contextmanager
def reentrant_refused() -> Iterator[None]:
    """Name reentrant checkpoints where a backward pass comes to one.

    Raises:
        CaptureError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_reentrant(error):
            raise
        raise _reentrant() from error


def _reentrant() -> CaptureError:
    return CaptureError(
        "reentrant activation checkpointing hides calls from the graph: use "
        "torch.utils.checkpoint with use_reentrant=False"
    )


def differentiated(
    start: Tensor, tensors: Sequence[Tensor], near: Iterable[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a scalar, and keep its graph.

    Args:
        start: The scalar.
        tensors: What to differentiate for.
        near: Values of whose layout all others are that the graph is made of; None if nobody knows.

    Returns:
        A gradient for each tensor; None for those that the scalar does not depend on.

    Raises:
        CaptureError: If the graph has reentrant checkpoints.
    """
    with reentrant_refused():
        return _differentiated(start, tensors, near)


def _differentiated(
    start: Tensor, tensors: Sequence[Tensor], near: Iterable[Tensor] | None
) -> tuple[Tensor | None, ...]:
    if near is not None and not any(map(_is_channels_last, near)):
        return torch.autograd.grad(start, tensors, retain_graph=True, allow_unused=True)
    with _WithInput():  # type: ignore[no-untyped-call]
        return torch.autograd.grad(start, tensors, retain_graph=True, allow_unused=True)


def _is_channels_last(value: Tensor) -> bool:
    """Tell whether channels lie beside each other in memory."""
    return value.layout is torch.strided and value.dim() > 3 and not value.is_contiguous()
