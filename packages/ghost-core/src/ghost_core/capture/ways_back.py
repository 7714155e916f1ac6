"""The way back through operations that only move entries, for the gradients of all samples at once.

The graph tells it as well, and for any operation, but takes longer for these, four times as long if
they are small; tables of relative positions go through them in each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from ghost_core._torch import gradient_hooks, version
from ghost_core.capture.functions import operation
from ghost_core.model_hooks import Hook

_RESHAPES = {"contiguous", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"}


class WayBack:
    """The way back through one operation.

    Args:
        given: What the operation was given.
        made: Its result.
        take: Makes the gradients of what it was given, `[N, *shape]`, of those of its result.
        read: What that reads besides.
    """

    def __init__(
        self, given: Tensor, made: Tensor, take: Callable[[Tensor], Tensor], *read: Tensor
    ) -> None:
        self.take = take
        self._hooked = given, made
        self._versions = [(value, version(value)) for value in (given, made, *read)]

    @property
    def is_open(self) -> bool:
        """Whether gradients go this way still: nothing was written to, and no hook changes them."""
        for value, before in self._versions:
            if version(value) != before:
                return False
        hooks = [hook for value in self._hooked for hook in gradient_hooks(value).values()]
        return all(isinstance(hook, Hook) for hook in hooks)  # ghost's own change nothing


def way_back(func: Any, args: Sequence[Any], given: Tensor, made: Tensor) -> WayBack | None:
    """Return the way back through an operation; None if it may do more than move entries.

    Of a table `[S, H]`, with the gradients of 8 samples:

        table[positions]     `[8, T, T, H]`: added up by position, `[8, S, H]`
        .permute(2, 0, 1)    `[8, H, T, T]`: permuted back, `[8, T, T, H]`
        [None]               `[8, 1, H, T, T]`: in the shape before, `[8, H, T, T]`
        16 * table           none: the graph is differentiated

    Args:
        func: The operation.
        args: Its positional inputs.
        given: The value among them whose entries it moves.
        made: Its result.
    """
    name = operation(func)
    if not args or args[0] is not given or given.dtype != made.dtype:
        return None
    if name in _RESHAPES and given.numel() == made.numel():
        return WayBack(given, made, partial(_reshaped, given.shape))
    if name == "permute" and len(args) > 1:
        dims = args[1:] if isinstance(args[1], int) else args[1]
        return WayBack(given, made, partial(_permuted, [dim % made.dim() for dim in dims]))
    if name == "__getitem__":
        return _through_index(args[1], given, made)
    return None


def _through_index(index: Any, given: Tensor, made: Tensor) -> WayBack | None:
    parts = index if isinstance(index, tuple) else (index,)
    whole = [part is None or (type(part) is slice and part == slice(None)) for part in parts]
    if all(whole):
        return WayBack(given, made, partial(_reshaped, given.shape))
    last, dim = parts[-1], len(parts) - 1
    leading = all(whole[:-1]) and None not in parts[:-1]
    if not leading or type(last) is not Tensor or last.dtype != torch.int64:
        return None
    return WayBack(given, made, partial(_added_up, given.shape, dim, last), last)


def _reshaped(shape: Size, rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), *shape)


def _permuted(dims: Sequence[int], rows: Tensor) -> Tensor:
    return rows.permute(0, *(dims.index(dim) + 1 for dim in range(len(dims))))


def _added_up(shape: Size, dim: int, index: Tensor, rows: Tensor) -> Tensor:
    """Add up the gradients of all places that an entry was taken to."""
    at = index.to(rows.device).flatten() % shape[dim]
    first = dim + 1  # after the samples
    moved = rows.flatten(first, dim + index.dim()) if index.dim() else rows.unsqueeze(first)
    return rows.new_zeros(len(rows), *shape).index_add_(first, at, moved)
