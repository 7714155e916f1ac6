"""What nodes of the graph may do to rows, by their kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from ghost_core._torch import is_custom, number_of, sizes_of
from ghost_core.split.movers import ALONG_ONE_AXIS, MOVING, Move, custom, signed


class Turn(NamedTuple):
    """How a node puts axes elsewhere, or new ones before others.

    Attributes:
        shape: The sizes of its result.
        axes: The axes of it that this is about, in order.
        order: What tells it from others on the same axes.
    """

    shape: tuple[int, ...]
    axes: Sequence[int]
    order: object = ()

    def is_outside(self, n: int) -> bool:
        """Tell whether it may bring an axis before that of n samples.

        It does not where the axes before its own have a multiple of n entries.

        With 4 samples, of values `[4, T, d]` and `[4, T, h, d]`:

            transpose(1, 2)   no: one axis, of 4 entries, comes before
            transpose(0, 1)   yes: none does
        """
        return bool(self.axes) and prod(self.shape[: self.axes[0]]) % n != 0

    def numbers(self, n: int) -> object:
        """Return what identifies it, other than by sizes that do not matter.

        They do where no single axis has a multiple of n entries.
        """
        sizes = self.shape[: self.axes[-1] + 1]
        found = [axis for axis, size in enumerate(sizes) if not size % n]
        return tuple(self.axes), self.order, tuple(found) if len(found) == 1 else sizes


def _on(*names: str, of_given: bool = False) -> Callable[[Any], Turn]:
    """Return what tells on which axes a node works, which it keeps under some names.

    Args:
        names: The names.
        of_given: Whether they are axes of what it is given, which may have others.
    """
    kept = [f"_saved_{name}" for name in names]

    def turn(node: Any) -> Turn:
        shape = sizes_of(node)
        given = node._saved_self_sym_sizes if of_given else shape
        return Turn(shape, sorted([signed(getattr(node, name), given) for name in kept]))

    return turn


def _on_first(node: Any) -> Turn:
    return Turn(sizes_of(node), (0,))


def _permuted(node: Any) -> Turn:
    dims = node._saved_dims
    order = tuple([signed(dim, dims) for dim in dims])
    return Turn(sizes_of(node), [axis for axis, dim in enumerate(order) if axis != dim], order)


def _grown(node: Any) -> Turn:
    shape, before = sizes_of(node), node._saved_self_sym_sizes
    if shape == before:
        return Turn(shape, ())
    new = len(shape) - len(before)  # new axes come first
    others = [new + axis for axis, size in enumerate(before) if size != shape[new + axis]]
    return Turn(shape, [*range(new), *others])


_TURNING: dict[str, Callable[[Any], Turn]] = {
    "Transpose": _on("dim0", "dim1"),
    "Permute": _permuted,
    "T": lambda node: Turn(sizes_of(node), (0, 1)),
    "Expand": _grown,
    "Repeat": _grown,
    "Cat": _on("dim"),
    "Stack": _on("dim"),
    "Unfold": _on("dimension", of_given=True),
    "Diagonal": _on("dim1", "dim2", of_given=True),
    **dict.fromkeys(["AsStrided", "PackPaddedSequence"], _on_first),
}
"""What may bring another axis to the front, by the name of its node without its ending."""


_COMBINED = ("_saved_dim", "_saved_training")
"""What sums, softmaxes and norms keep of the axes that they work along."""


@dataclass(frozen=True, slots=True)
class Role:
    """What nodes of a kind may do to rows.

    Attributes:
        name: What they are called where it does not matter which of several ways torch took.
        describe: Describes how they move rows; None if they never do.
        turn: Tells how one puts axes elsewhere; None if none does.
        keeps_axis: Whether a node keeps the one axis that it works along, and its sizes show.
        nests: Whether they join rows in a nested tensor, or take them out of one.
        kept: The names of what tells which rows they combine, where they do.
        views: Whether they see the same entries in other sizes.
        wanted: Whether they do anything of this; nearly all kinds do nothing.
    """

    name: str
    describe: Callable[[Any], Move] | None
    turn: Callable[[Any], Turn] | None
    keeps_axis: bool
    nests: bool
    kept: Sequence[str]
    views: bool
    wanted: bool


def joins_samples(node: Any, n: int) -> bool:
    """Tell whether a view of entries that samples lead has entries of several along another axis.

    With 4 samples of 6 steps, `[4, 6, d]`, seen as

        [24, d], [8, 3, d]   no: 6 or 2 for each sample
        [6, 4, d]            yes: the second group of 4 has steps of two samples
    """
    before, after = node._saved_self_sym_sizes, sizes_of(node)
    if before and after and before[0] > 1 and after[0] > 1:  # as nearly all have
        return before[0] % n == 0 and after[0] % n != 0
    return _lead(before, n) and not _lead(after, n)


def _lead(shape: Sequence[int], n: int) -> bool:
    """Tell whether the first axis that is any has k · n entries."""
    for size in shape:
        if size > 1:
            return size % n == 0
    return n == 1


def within(node: Any, n: int) -> bool:
    """Tell at once whether a node works within the entries of a first axis of n samples, or k · n.

    Nearly all do; what is said of no more than that need not be described.
    """
    axis = number_of(node._saved_dim)
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    shape = sizes_of(node) if sizes is None else sizes
    return axis != 0 and axis != -len(shape) and shape[0] % n == 0


_VIEWS = {"View", "ReshapeAlias", "UnsafeView"}


def _role(kind: type) -> Role:
    name = kind.__name__.partition("Backward")[0]
    describe = custom if is_custom(kind) or name == "CppFunction" else MOVING.get(name)
    turn, nests, views = _TURNING.get(name), name.startswith("Nested"), name in _VIEWS
    kept = () if describe or turn or is_custom(kind) else [x for x in _COMBINED if hasattr(kind, x)]
    wanted = bool(describe or turn or nests or kept or views)
    shown = "View" if views else _SAME.get(kind.__name__, kind.__name__)
    return Role(shown, describe, turn, describe in ALONG_ONE_AXIS, nests, kept, views, wanted)


_SAME = {"AliasBackward0": "SliceBackward0"}
"""Torch makes an alias of a slice that leaves nothing out.

It makes views in other ways, too, while a mode watches, as one does in the first batch.
"""


class _Roles(dict[type, Role]):
    """The roles of kinds of nodes, found out once for each of torch's."""

    def __missing__(self, kind: type) -> Role:
        role = _role(kind)
        if not is_custom(kind):  # of which there may be a new one in each pass
            self[kind] = role
        return role


ROLES = _Roles()
"""What nodes of a kind may do to rows."""
