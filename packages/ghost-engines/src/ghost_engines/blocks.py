"""Where each parameter's projected gradient stands in a row, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size

from ghost_core import CaptureError, TrackedParameter
from ghost_core.algebra import matrix_shape
from ghost_core.arguments import whole


@dataclass(frozen=True)
class Block:
    """One parameter's part of a row: `k_left · k_right` numbers from `offset` on.

    The parameter is seen as a matrix of its first axis by all others; a linear layer's weight is
    projected to k_left = k_o output and k_right = k_i input dimensions. The block is the projected
    matrix, row by row.

    Attributes:
        parameter: Name of the parameter.
        shape: Its shape.
        offset: Column of the row where the block starts.
        k_left: Dimensions that the first axis is projected to.
        k_right: Dimensions that the other axes together are projected to.
    """

    parameter: str
    shape: Size
    offset: int
    k_left: int
    k_right: int

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.k_left * self.k_right

    @property
    def columns(self) -> slice:
        """Columns of the row."""
        return slice(self.offset, self.offset + self.size)

    def manifest(self) -> dict[str, Any]:
        """Return the block as JSON-able values."""
        return {
            "name": self.parameter,
            "shape": list(self.shape),
            "offset": self.offset,
            "k_left": self.k_left,
            "k_right": self.k_right,
        }


def arrange(
    parameters: Sequence[TrackedParameter], *, dim: int | None, total_dim: int | None, min_dim: int
) -> tuple[Block, ...]:
    """Lay out blocks in order of parameter names.

    Args:
        parameters: The parameters, in order of their names.
        dim: Dimensions per parameter.
        total_dim: Dimensions of a whole row instead, shared out in proportion to the square roots
            of the parameters' sizes. Rows get no longer than this.
        min_dim: The least that an axis is projected to, if it has as many dimensions.

    Raises:
        CaptureError: If not just one of `dim` and `total_dim` is given, a number is not positive,
            or `min_dim` does not fit into `total_dim`.
    """
    if (dim is None) == (total_dim is None):
        raise CaptureError("give either dim (per parameter) or total_dim (of a row)")
    min_dim = whole("min_dim", min_dim, least=1)
    if total_dim is None:
        shares = [whole("dim", dim, least=1)] * len(parameters)
    else:
        shares = _shares(parameters, whole("total_dim", total_dim, least=1), min_dim)
    blocks: list[Block] = []
    offset = 0
    for parameter, share in zip(parameters, shares, strict=True):
        k_left, k_right = _axes(parameter.shape, share, min_dim, at_most=total_dim is not None)
        blocks.append(Block(parameter.name, parameter.shape, offset, k_left, k_right))
        offset = blocks[-1].columns.stop
    return tuple(blocks)


def _shares(parameters: Sequence[TrackedParameter], total_dim: int, min_dim: int) -> list[int]:
    """Give every parameter the least it needs, and share the rest out."""
    least = [
        math.prod(min(min_dim, n) for n in matrix_shape(parameter.shape))
        for parameter in parameters
    ]
    rest = total_dim - sum(least)
    if rest < 0:
        raise CaptureError(
            f"total_dim={total_dim} is too small for {len(parameters)} parameters with "
            f"min_dim={min_dim}, which need {sum(least)}: raise total_dim, lower min_dim, or "
            "select fewer layers"
        )
    roots = [math.sqrt(parameter.shape.numel()) for parameter in parameters]
    return [own + int(rest * root / sum(roots)) for own, root in zip(least, roots, strict=True)]


def _axes(shape: Size, dim: int, min_dim: int, *, at_most: bool) -> tuple[int, int]:
    """Split k = dim over both axes with `k_right / k_left ≈ √(n_left / n_right)`."""
    n_left, n_right = matrix_shape(shape)
    rounded = math.floor if at_most else round
    most_right = max(dim // min(min_dim, n_left), 1) if at_most else n_right
    k_right = _within(rounded(math.sqrt(dim * math.sqrt(n_left / n_right))), min_dim, n_right)
    k_right = min(k_right, most_right)
    k_left = _within(rounded(dim / k_right), min_dim, n_left)
    # An axis that is shorter than its share leaves more to the other.
    k_right = min(_within(rounded(dim / k_left), min_dim, n_right), most_right)
    return k_left, k_right


def _within(k: int, least: int, n: int) -> int:
    return min(max(k, least, 1), n)
