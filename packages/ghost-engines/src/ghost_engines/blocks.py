"""Where each parameter's projected gradient stands in a row, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Size

from ghost_core import CaptureError, TrackedParameter
from ghost_core.algebra import matrix_shape
from ghost_core.arguments import whole

Dim = int | Literal["whole"] | tuple[int, int]
"""Dimensions of a parameter's part of a row: about so many, all, or just `(k_left, k_right)`."""


@dataclass(frozen=True)
class Block:
    """One parameter's part of a row: `k_left · k_right` numbers from `offset` on.

    The parameter is seen as a matrix of its first axis by all others; a linear layer's weight is
    projected to k_left = k_o output and k_right = k_i input dimensions. The block is the projected
    matrix, row by row. One that is sketched is seen as one column.

    Attributes:
        parameter: Name of the parameter.
        shape: Its shape.
        offset: Column of the row where the block starts.
        k_left: Dimensions that the first axis is projected to.
        k_right: Dimensions that the other axes together are projected to.
        sketched: Whether it is sketched as a whole, and not side by side.
    """

    parameter: str
    shape: Size
    offset: int
    k_left: int
    k_right: int
    sketched: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the matrix that the parameter is seen as."""
        return _matrix(self.shape, self.sketched)

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
            **({"sketched": True} if self.sketched else {}),
        }


def arrange(
    parameters: Sequence[TrackedParameter],
    *,
    dim: Dim | None,
    total_dim: int | None,
    min_dim: int,
    dims: Mapping[str, Dim] = MappingProxyType({}),
    sketched: Set[str] = frozenset(),
) -> tuple[Block, ...]:
    """Lay out blocks in order of parameter names.

    Args:
        parameters: The parameters, in order of their names.
        dim: Dimensions per parameter.
        total_dim: Dimensions of a whole row instead, shared out in proportion to the square roots
            of the parameters' sizes. Rows get no longer than this.
        min_dim: The least that an axis is projected to, if it has as many dimensions.
        dims: Dimensions of some parameters, by name.
        sketched: Names of parameters that are sketched.

    Raises:
        CaptureError: If not just one of `dim` and `total_dim` is given, a number is not positive,
            or more than there is, or `min_dim` does not fit into `total_dim`.
    """
    if (dim is None) == (total_dim is None):
        raise CaptureError("give either dim (per parameter) or total_dim (of a row)")
    min_dim = whole("min_dim", min_dim, least=1)
    own: dict[str, tuple[int, int]] = {}
    for parameter in parameters:
        if (given := dims.get(parameter.name, dim)) is not None:
            matrix = _matrix(parameter.shape, parameter.name in sketched)
            own[parameter.name] = _sides(parameter.name, given, matrix, min_dim)
    if total_dim is not None:
        others = [each for each in parameters if each.name not in own]
        total = whole("total_dim", total_dim, least=1) - sum(map(math.prod, own.values()))
        matrices = [_matrix(each.shape, each.name in sketched) for each in others]
        shares = _shares(matrices, total, total_dim, min_dim)
        for parameter, matrix, share in zip(others, matrices, shares, strict=True):
            own[parameter.name] = _axes(matrix, share, min_dim, at_most=True)
    blocks: list[Block] = []
    offset = 0
    for parameter in parameters:
        name, shape = parameter.name, parameter.shape
        blocks.append(Block(name, shape, offset, *own[name], name in sketched))
        offset = blocks[-1].columns.stop
    return tuple(blocks)


def _matrix(shape: Size, sketched: bool) -> tuple[int, int]:
    return (shape.numel(), 1) if sketched else matrix_shape(shape)


def _sides(name: str, dim: Dim, matrix: tuple[int, int], min_dim: int) -> tuple[int, int]:
    """Return k_left and k_right of a parameter whose dimensions are given."""
    if dim == "whole":
        return matrix
    if isinstance(dim, tuple | list) and len(dim) == 2:
        left, right = (whole(f"a side of dims of {name}", side, least=1) for side in dim)
        if left > matrix[0] or right > matrix[1]:
            raise CaptureError(
                f"dims of {name} are {(left, right)}",
                reason=f"its gradient is a matrix of {matrix[0]} by {matrix[1]} numbers",
                remedy="give sides that are no longer, or 'whole'",
            )
        return left, right
    if isinstance(dim, str | tuple | list):
        raise CaptureError(
            f"dimensions of {name} are {dim!r}",
            reason="nobody knows how many these are",
            remedy="give an integer, 'whole', or (k_left, k_right)",
        )
    return _axes(matrix, whole("dim", dim, least=1), min_dim, at_most=False)


def _shares(
    matrices: Sequence[tuple[int, int]], total: int, total_dim: int, min_dim: int
) -> list[int]:
    """Give every parameter the least it needs, and share the rest out."""
    least = [math.prod(min(min_dim, n) for n in matrix) for matrix in matrices]
    rest = total - sum(least)
    if rest < 0:
        needed = total_dim - total + sum(least)
        raise CaptureError(
            f"total_dim={total_dim} is too small for {len(matrices)} parameters with "
            f"min_dim={min_dim}, which need {needed}: raise total_dim, lower min_dim, or "
            "select fewer layers"
        )
    roots = [math.sqrt(math.prod(matrix)) for matrix in matrices]
    return [own + int(rest * root / sum(roots)) for own, root in zip(least, roots, strict=True)]


def _axes(matrix: tuple[int, int], dim: int, min_dim: int, *, at_most: bool) -> tuple[int, int]:
    """Split k = dim over both axes with `k_right / k_left ≈ √(n_left / n_right)`."""
    n_left, n_right = matrix
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
