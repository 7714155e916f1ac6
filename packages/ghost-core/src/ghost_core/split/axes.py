"""Which axis of a call's inputs and outputs holds the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ghost_core._torch import tree_map
from ghost_core.errors import WrongSplitError
from ghost_core.sampler import Call
from ghost_core.split.refusals import wrong_rows
from ghost_core.tracking import TrackedModule

TensorT = TypeVar("TensorT", Tensor, Tensor | None)


@dataclass(slots=True, eq=False)
class RowAxes:
    """Where a call has its rows. Each call has its own, which what probes find is told by.

    Nothing is changed in it; to make one that is frozen takes several times as long.

    Attributes:
        inputs: Axis of the rows in its inputs, as far as they have one; 0 where they stay as they
            are.
        outputs: Axis of the rows in each output.
        count: Number of rows R.
        owner: Sample of each row, int64 `[R]`, where the engine was told; None elsewhere.
        routed: Whether samples have any number of rows each, which is found out in every pass.
    """

    inputs: int
    outputs: tuple[int, ...]
    count: int
    owner: Tensor | None = None
    routed: bool = False

    def is_folded(self, n: int) -> bool:
        """Tell whether n samples have several rows each, in an order to be found out once."""
        return self.owner is None and self.count != n and not self.routed

    def rows_first(self, values: Sequence[TensorT]) -> list[TensorT]:
        """Move the rows of outputs, or of their gradients, to the first axis; scalars stay."""
        if not any(self.outputs):
            return list(values)
        return [
            value.movedim(dim, 0) if dim and value is not None and value.dim() else value
            for value, dim in zip(values, self.outputs, strict=True)
        ]

    def tell_apart(self, outputs: Sequence[Tensor]) -> bool:
        """Tell whether an output has all the rows, not one for all samples."""
        return any(
            _size(output, dim) == self.count
            for output, dim in zip(outputs, self.outputs, strict=True)
        )

    def expanded(self, outputs: list[Tensor]) -> list[Tensor]:
        """Return outputs with all their rows; one computed once for all samples is expanded.

        If all have theirs, it is the list itself.
        """
        if len(outputs) == 1:
            shape, dim = outputs[0].shape, self.outputs[0]
            if len(shape) > dim and shape[dim] == self.count:
                return outputs
        placed = list(zip(outputs, self.outputs, strict=True))
        if all(_size(output, dim) in (None, self.count) for output, dim in placed):
            return outputs
        return [
            output
            if _size(output, dim) in (None, self.count)
            else output.expand(*output.shape[:dim], self.count, *output.shape[dim + 1 :])
            for output, dim in placed
        ]


def find_axes(
    tracked: TrackedModule,
    outputs: Sequence[Tensor],
    n: int,
    owner: Tensor | None,
    *,
    foldable: bool,
    routes: bool,
) -> tuple[RowAxes, WrongSplitError | None]:
    """Find the rows of a call.

    With 3 samples on axis 0, outputs of a module may be

        [3, T, d]   rows that are samples
        [1, T, d]   one row for all samples
        [6, d]      6 = 2 · 3 rows, folded: probes tell in which order
        [4, d]      rows in any number: routed, and asked for in every pass, or refused

    Args:
        tracked: The module.
        outputs: Its differentiable outputs.
        n: Number of samples in the pass.
        owner: Sample of each row, where the engine was told.
        foldable: Whether rows may be in another number than samples, since a probe will tell whose
            they are: `k · n` rows are samples folded with another axis, any others are routed.
        routes: Whether it is known that the model routes rows, as a mixture of experts does.

    Returns:
        Where they are, and what to say if routed rows turn out to be of no sample each.

    Raises:
        WrongSplitError: If an output has neither one row nor the rows of the samples.
    """
    dims = tracked.sampler.batch_dims(tracked.module, len(outputs))
    inputs = 0  # a sampler that knows the axes of the outputs knows those of the inputs
    if dims is None and owner is None and not routes and len(outputs) == 1:
        dim = tracked.batch_dim
        if _size(outputs[0], dim) == n:  # as nearly all are
            return RowAxes(dim, (dim,), n), None
    if dims is None:
        # A module that is sequence-first inside may return one row per sample all the same.
        expected = tracked.batch_dim
        dims = tuple(
            0 if _size(each, expected) not in (1, n) and _size(each, 0) in (1, n) else expected
            for each in outputs
        )
        inputs = expected if any(dims) else 0
    sizes = {_size(output, dim) for output, dim in zip(outputs, dims, strict=True)}
    known = {size for size in sizes if size is not None}
    if not known:
        raise WrongSplitError(
            f"{tracked.label} returned a scalar, or nothing with an axis {max(dims)} for samples: "
            "it cannot be split by sample, exclude it"
        )
    several = known - {1} or known
    if routes and owner is None and len(several) == 1:
        return RowAxes(inputs, dims, max(several), routed=True), None
    count = n if owner is None else len(owner)
    if owner is None and foldable and len(several) == 1 and n and not max(several) % n:
        count = max(count, *several)
    if not (wrong := known - {1, count}):
        return RowAxes(inputs, dims, count, owner), None
    refusal = wrong_rows(tracked, min(wrong), n, owner)
    if owner is not None or not foldable or len(several) > 1:
        raise refusal
    return RowAxes(inputs, dims, max(several), routed=True), refusal


def describe(
    tracked: TrackedModule,
    outputs: Sequence[Tensor],
    axes: RowAxes,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: object,
) -> Call:
    """Describe a call to the module's sampler.

    Args:
        tracked: The module.
        outputs: Its differentiable outputs.
        axes: Where the call has its rows.
        args: Positional inputs.
        kwargs: Keyword inputs.
        before: What the sampler kept before the call.
    """
    device = outputs[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if axes.inputs:
        args, kwargs = _rows_first(args, axes.inputs), _rows_first(kwargs, axes.inputs)
    return Call(
        tracked.name,
        tracked.module,
        args,
        kwargs,
        tuple(outputs if axes.outputs == (0,) else axes.rows_first(outputs)),
        dict(tracked.shapes),
        batch_dim=axes.inputs,
        autocast=autocast,
        before=before,
    )


def _rows_first(value: Any, dim: int) -> Any:
    """Move an axis to the front in all tensors of a tree that have it."""

    def move(leaf: Any) -> Any:
        return leaf.movedim(dim, 0) if isinstance(leaf, Tensor) and leaf.dim() > dim else leaf

    return tree_map(move, value)


def _size(output: Tensor, dim: int) -> int | None:
    shape = output.shape
    return shape[dim] if len(shape) > dim else None
