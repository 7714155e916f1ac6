"""What nodes of the graph may do to rows, by their kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

from ghost_core._torch import is_custom, number_of
from ghost_core.split.movers import ALONG_ONE_AXIS, MOVING, Move, custom, made_by, signed

_Told = TypeVar("_Told")


@dataclass(frozen=True)
class Turn:
    """How a node puts axes elsewhere, or new ones before others.

    Attributes:
        axes: The axes of its result that this is about.
        order: What tells it from others on the same axes.
    """

    axes: Sequence[int]
    order: object = ()

    def is_outside(self, shape: Sequence[int], n: int) -> bool:
        """Tell whether it may bring an axis before that of n samples, in a result of a shape.

        It does not where the axes before its own have a multiple of n entries.

        With 4 samples, of values `[4, T, d]` and `[4, T, h, d]`:

            transpose(1, 2)   no: one axis, of 4 entries, comes before
            transpose(0, 1)   yes: none does
        """
        return bool(self.axes) and prod(shape[: min(self.axes)]) % n != 0

    def numbers(self, shape: Sequence[int], n: int) -> object:
        """Return what identifies it, other than by sizes that do not matter.

        They do where no single axis has a multiple of n entries.
        """
        sizes = tuple(shape[: max(self.axes) + 1])
        found = tuple(axis for axis, size in enumerate(sizes) if size % n == 0)
        return tuple(self.axes), self.order, found if len(found) == 1 else sizes


def _on(*names: str) -> Callable[[Any], Turn]:
    """Return what tells on which axes a node works, which it keeps under some names."""

    def turn(node: Any) -> Turn:
        shape = getattr(node, "_saved_self_sym_sizes", None) or made_by(node)
        return Turn(sorted(signed(getattr(node, f"_saved_{name}"), shape) for name in names))

    return turn


def _on_first(node: Any) -> Turn:
    return Turn([0])


def _permuted(node: Any) -> Turn:
    order = tuple(signed(dim, node._saved_dims) for dim in node._saved_dims)
    return Turn([axis for axis, dim in enumerate(order) if axis != dim], order)


def _grown(node: Any) -> Turn:
    shape, before = made_by(node), node._saved_self_sym_sizes
    before = (*[None] * (len(shape) - len(before)), *before)  # new axes come first
    return Turn([axis for axis, size in enumerate(shape) if size != before[axis]])


_TURNING: dict[str, Callable[[Any], Turn]] = {
    "Transpose": _on("dim0", "dim1"),
    "Permute": _permuted,
    "T": lambda node: Turn([0, 1]),
    "Expand": _grown,
    "Repeat": _grown,
    "Cat": _on("dim"),
    "Stack": _on("dim"),
    "Unfold": _on("dimension"),
    "Diagonal": _on("dim1", "dim2"),
    **dict.fromkeys(["AsStrided", "PackPaddedSequence"], _on_first),
}
"""What may bring another axis to the front, by the name of its node without its ending."""


_COMBINED = ("_saved_dim", "_saved_training")
"""What sums, softmaxes and norms keep of the axes that they work along."""


@dataclass(frozen=True)
class Role:
    """What nodes of a kind may do to rows.

    Attributes:
        describe: Describes how they move rows; None if they never do.
        turn: Tells how one puts axes elsewhere; None if none does.
        keeps_axis: Whether a node keeps the one axis that it works along, and its sizes show.
        nests: Whether they join rows in a nested tensor, or take them out of one.
        kept: The names of what tells which rows they combine, where they do.
        views: Whether they see the same entries in other sizes.
    """

    describe: Callable[[Any], Move] | None
    turn: Callable[[Any], Turn] | None
    keeps_axis: bool
    nests: bool
    kept: Sequence[str]
    views: bool

    def combines(self, node: Any) -> tuple[object, ...]:
        """Return what a node keeps of which rows it combines."""
        return tuple(getattr(node, name) for name in self.kept)


def joins_samples(node: Any, n: int) -> bool:
    """Tell whether a view of entries that samples lead has entries of several along another axis.

    With 4 samples of 6 steps, `[4, 6, d]`, seen as

        [24, d], [8, 3, d]   no: 6 or 2 for each sample
        [6, 4, d]            yes: the second group of 4 has steps of two samples
    """
    return _lead(node._saved_self_sym_sizes, n) and not _lead(made_by(node), n)


def _lead(shape: Sequence[int], n: int) -> bool:
    """Tell whether the first axis that is any has k · n entries."""
    return next((size for size in shape if size > 1), 1) % n == 0


def within(node: Any, n: int) -> bool:
    """Tell at once whether a node works within the entries of a first axis of n samples, or k · n.

    Nearly all do; what is said of no more than that need not be described.
    """
    axis = number_of(node._saved_dim)
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    shape = made_by(node) if sizes is None else sizes
    return axis != 0 and axis != -len(shape) and shape[0] % n == 0


def _role(kind: type) -> Role | None:
    name = kind.__name__.partition("Backward")[0]
    describe = custom if is_custom(kind) or name == "CppFunction" else MOVING.get(name)
    turn, nests = _TURNING.get(name), name.startswith("Nested")
    kept = () if describe or turn or is_custom(kind) else [x for x in _COMBINED if hasattr(kind, x)]
    views = _view(kind)
    if describe is None and turn is None and not (nests or kept or views):
        return None
    return Role(describe, turn, describe in ALONG_ONE_AXIS, nests, kept, views)


def _view(kind: type) -> bool:
    return kind.__name__.partition("Backward")[0] in {"View", "ReshapeAlias", "UnsafeView"}


class _ByKind(dict[type, _Told]):
    """What is known of a kind of nodes, found out once for each of torch's."""

    def __init__(self, tell: Callable[[type], _Told]) -> None:
        super().__init__()
        self._tell = tell

    def __missing__(self, kind: type) -> _Told:
        told = self._tell(kind)
        if not is_custom(kind):  # of which there may be a new one in each pass
            self[kind] = told
        return told


ROLES = _ByKind(_role)
"""What nodes of a kind may do to rows; None for nearly all kinds, which do nothing."""

VIEWS = _ByKind(_view)
"""Whether nodes of a kind see the same entries in other sizes."""
