"""Differentiates for parameters alone, past a call that makes torch end the process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ghost_core._torch import DispatchMode

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
    """
    if near is not None and not any(map(_is_channels_last, near)):
        return torch.autograd.grad(start, tensors, retain_graph=True, allow_unused=True)
    with _WithInput():  # type: ignore[no-untyped-call]
        return torch.autograd.grad(start, tensors, retain_graph=True, allow_unused=True)


def _is_channels_last(value: Tensor) -> bool:
    """Tell whether channels lie beside each other in memory."""
    return value.layout is torch.strided and value.dim() > 3 and not value.is_contiguous()
