"""What a call got and returned, taken apart into tensors and everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ghost_core import Call, WrongSplitError
from ghost_core._torch import tree_flatten
from ghost_core.tracking import dotted_name


@dataclass(frozen=True)
class InputRows:
    """Where a tensor among the inputs has its samples.

    Attributes:
        own: Whether the samples have a row each; else they share all of it.
        axis: Axis that the module expects where the tensor is kept with its axis 0.
        fold: Whether the module expects the first two axes, `[N, k, ...]`, folded to `[N·k, ...]`.
    """

    own: bool
    axis: int = 0
    fold: bool = False

    def first(self, value: Tensor, count: int) -> Tensor:
        """Lay out a tensor that the module got with the samples on its axis 0."""
        return value.unflatten(0, (count, -1)) if self.fold else value.movedim(self.axis, 0)

    def whole(self, value: Tensor) -> Tensor:
        """Lay out a tensor as the module got it."""
        if self.fold:
            return value.flatten(0, 1)
        return value.movedim(0, self.axis) if self.axis else value

    def single(self, value: Tensor) -> Tensor:
        """Make one sample's row a batch of one."""
        return value if self.fold else value.unsqueeze(self.axis)


@dataclass(frozen=True)
class TensorAt:
    """Stands for a tensor among the inputs.

    Attributes:
        at: Its position among the different ones.
    """

    at: int


@dataclass(frozen=True)
class OutputRows:
    """An output tensor with rows.

    Attributes:
        index: Position among the recorded outputs.
        at: Position among all floating tensors that the module returns.
        axis: Where the module has its rows.
        dtype: Dtype that one sample's rows are to have; None where it is that of the call. Under
            autocast, some batching rules add biases in another dtype than the call did.
    """

    index: int
    at: int
    axis: int
    dtype: torch.dtype | None = None

    def row(self, value: Tensor) -> Tensor:
        """Return the row of an output for one sample.

        Raises:
            RuntimeError: If it does not have exactly one.
        """
        if value.dim() <= self.axis or value.shape[self.axis] != 1:
            raise RuntimeError(f"an output of shape {tuple(value.shape)} for one sample")
        row = value.select(self.axis, 0)
        return row if self.dtype is None else row.to(self.dtype)


def taken_apart(
    call: Call, sides: Mapping[int, InputRows] | None, count: int
) -> tuple[tuple[Any, ...], Any, tuple[Tensor, ...], tuple[InputRows, ...]]:
    """Separate the inputs' tensors, each of them once and samples first, from everything else."""
    flat, spec = tree_flatten((call.args, call.kwargs), is_leaf=_is_packed)
    places: dict[object, TensorAt] = {}
    slots: list[Any] = []
    inputs: list[Tensor] = []
    all_rows: list[InputRows] = []
    for value in flat:
        _check_kind(value)
        if not isinstance(value, Tensor):
            # The call wrote to a cache. It runs again without one, which is the same if it was
            # empty; if not, what it returns differs.
            slots.append(None if is_cache(value) else value)
            continue
        # Modules ask whether query, key and value are the same.
        view = value.untyped_storage().data_ptr(), value.storage_offset(), value.dtype
        kind = (*view, value.shape, value.stride(), value.requires_grad, value.is_neg())
        if kind not in places:
            places[kind] = TensorAt(len(inputs))
            if sides is None:
                mine = value.dim() > 0 and len(value) == count
                rows = InputRows(mine, call.batch_dim if value.dim() > call.batch_dim else 0)
            else:
                rows = sides.get(id(value), InputRows(False))
                value = rows.first(value, count) if rows.own else value
            inputs.append(value)
            all_rows.append(rows)
        slots.append(places[kind])
    return tuple(slots), spec, tuple(inputs), tuple(all_rows)


def _is_packed(value: object) -> bool:
    return isinstance(value, PackedSequence)


def _check_kind(value: object) -> None:
    """Refuse inputs that hold samples in a way of their own, or a state."""
    if _is_packed(value):
        raise WrongSplitError(reason="it got a PackedSequence", remedy="give it padded tensors")
    if isinstance(value, Tensor) and (value.is_nested or value.layout is not torch.strided):
        raise WrongSplitError(
            reason="it got a nested or sparse tensor", remedy="give it padded, dense tensors"
        )


def is_cache(value: object) -> bool:
    """Tell a cache of transformers, which is never imported here, by its class."""
    name = "transformers.cache_utils.Cache"
    return any(dotted_name(kind) == name for kind in type(value).__mro__)
