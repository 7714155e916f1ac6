"""Which axis of a call's outputs holds the samples, and which sample each row belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ghost_core.errors import WrongSplitError
from ghost_core.sampler import Call
from ghost_core.tracking import TrackedModule

TensorT = TypeVar("TensorT", Tensor, Tensor | None)


@dataclass(frozen=True)
class Layout:
    """Where the outputs of a call have their rows.

    Attributes:
        dims: Axis of the rows in each output.
        rows: Number of rows R.
        owner: Sample of each row, int64 `[R]`, where the engine was told; None elsewhere.
    """

    dims: tuple[int, ...]
    rows: int
    owner: Tensor | None = None

    def rows_first(self, values: Sequence[TensorT]) -> list[TensorT]:
        """Move the rows of outputs, or of their gradients, to the first axis; scalars stay."""
        return [
            value.movedim(dim, 0) if dim and value is not None and value.dim() else value
            for value, dim in zip(values, self.dims, strict=True)
        ]

    def is_folded(self, n: int) -> bool:
        """Tell whether n samples have several rows each, in an order to be found out."""
        return self.owner is None and self.rows != n

    def outer_sizes(self, rows: Sequence[int], sample: int, n: int) -> set[int]:
        """Return the orders in which all of some rows belong to one sample.

        Rows may be `[A, N, B]` flattened; the result has each A for which that fits. A is 1 where
        rows are sample-major, and `rows / n` where they are sample-minor.
        """
        each, index = self.rows // n, torch.tensor(rows)
        return {
            outer
            for outer in range(1, each + 1)
            if each % outer == 0 and (index // (each // outer) % n == sample).all()
        }

    def are_of(self, rows: Sequence[int], sample: int, n: int) -> bool:
        """Tell whether rows can all belong to one sample."""
        if self.owner is not None:
            return bool((self.owner[rows] == sample).all())
        if self.is_folded(n):
            return bool(self.outer_sizes(rows, sample, n) & {1, self.rows // n})
        return list(rows) == [sample]


def samples_first(value: Any, dim: int) -> Any:
    """Move an axis to the front in all tensors of a tree that have more axes than that."""
    if not dim:
        return value

    def move(leaf: Any) -> Any:
        return leaf.movedim(dim, 0) if isinstance(leaf, Tensor) and leaf.dim() > dim else leaf

    return tree_map(move, value)


def lay_out(
    tracked: TrackedModule,
    outputs: Sequence[Tensor],
    n: int,
    owner: Tensor | None,
    *,
    foldable: bool,
) -> Layout:
    """Find the rows of a call's outputs.

    Args:
        tracked: The module.
        outputs: Its differentiable outputs.
        n: Number of samples in the pass.
        owner: Sample of each row, where the engine was told.
        foldable: Whether `k · n` rows may be samples folded with another axis, since a probe will
            tell how.

    Raises:
        WrongSplitError: If an output has neither one row nor the rows of the samples.
    """
    dims = tracked.output_dims(len(outputs))
    if tracked.sampler.batch_dims(tracked.module, len(outputs)) is None:
        # A module that is sequence-first inside may return one row per sample all the same.
        dims = tuple(
            0 if not _has(output, dim, n) and _has(output, 0, n) else dim
            for output, dim in zip(outputs, dims, strict=True)
        )
    sizes = {
        output.shape[dim] for output, dim in zip(outputs, dims, strict=True) if output.dim() > dim
    }
    if not sizes:
        raise WrongSplitError(
            f"{tracked.label} returned a scalar, or nothing with an axis {max(dims)} for samples: "
            "it cannot be split by sample, exclude it"
        )
    rows = n if owner is None else len(owner)
    several = sizes - {1} or sizes
    if owner is None and foldable and len(several) == 1 and n and not max(several) % n:
        rows = max(rows, *several)
    if wrong := sizes - {1, rows}:
        if owner is not None:
            raise WrongSplitError(
                f"{tracked.label} returned {min(wrong)} rows, and {tracked.row_owner!r}, which "
                f"row_owner names for it, tells the samples of {rows}: give one entry per row, "
                f"positions of samples from 0 to {n - 1}"
            )
        raise wrong_rows(tracked, min(wrong), n)
    return Layout(dims, rows, owner)


def _has(output: Tensor, dim: int, n: int) -> bool:
    return output.dim() > dim and output.shape[dim] in (1, n)


def expanded(output: Tensor, dim: int, rows: int) -> Tensor:
    """Return an output with all its rows; one computed once for all samples is expanded."""
    if output.dim() <= dim or output.shape[dim] == rows:
        return output
    return output.expand(*output.shape[:dim], rows, *output.shape[dim + 1 :])


def describe(
    tracked: TrackedModule,
    outputs: Sequence[Tensor],
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: object,
) -> Call:
    """Describe a call to the module's sampler.

    Args:
        tracked: The module.
        outputs: Its differentiable outputs, rows first.
        layout: Where they had their rows.
        args: Positional inputs.
        kwargs: Keyword inputs.
        before: What the sampler kept before the call.
    """
    # A sampler that knows the axes of the outputs knows those of the inputs.
    knows = tracked.sampler.batch_dims(tracked.module, len(outputs)) is not None
    dim = tracked.batch_dim if any(layout.dims) and not knows else 0
    device = outputs[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return Call(
        tracked.name,
        tracked.module,
        samples_first(args, dim),
        samples_first(kwargs, dim),
        tuple(outputs),
        tracked.shapes,
        batch_dim=dim,
        autocast=autocast,
        before=before,
    )


def wrong_rows(tracked: TrackedModule, rows: int, n: int) -> WrongSplitError:
    """Explain an output whose axis for samples does not have one entry per sample."""
    folded = (
        f", {rows} = {n} * {rows // n}: rows folded into the batch?" if n and rows % n == 0 else ""
    )
    name = tracked.name
    axis = f"axis {tracked.batch_dim}" if tracked.batch_dim else "the first axis"
    return WrongSplitError(
        f"gradients cannot be split by sample: {tracked.label} returned "
        f"{rows} rows for {n} samples{folded}",
        reason=f"{axis} of its output is not the samples",
        remedy="keep one row per sample, [N, ..., features]; give what is computed once for all "
        f"samples, as positions are, one row, [1, ...]; say where the samples are, with batch_dim="
        f"{{{name!r}: axis}}, or which sample each row belongs to, with row_owner={{{name!r}: "
        "key}; or leave the module out with exclude=...",
    )
