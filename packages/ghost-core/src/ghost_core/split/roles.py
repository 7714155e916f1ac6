"""What nodes of the graph may do to rows, by their kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ghost_core._graph import is_custom, number_of
from ghost_core.split.movers import ALONG_ONE_AXIS, MOVING, Move, custom, made_by, signed

_Told = TypeVar("_Told")


def _first_axis(*names: str) -> Callable[[Any], bool]:
    """Return what tells whether an operation changes which axis is the first."""

    def turns(node: Any) -> bool:
        axes = [number_of(getattr(node, f"_saved_{name}")) for name in names]
        return 0 in axes or (min(axes) < 0 and -len(made_by(node)) in axes)

    return turns


def _grows(node: Any) -> bool:
    shape, before = made_by(node), node._saved_self_sym_sizes
    return len(shape) > len(before) or shape[:1] != before[:1]


_TURNING: dict[str, Callable[[Any], bool]] = {
    "Transpose": _first_axis("dim0", "dim1"),
    "Permute": lambda node: signed(node._saved_dims[0], node._saved_dims) != 0,
    "T": lambda node: True,
    "Cat": _first_axis("dim"),
    "Stack": _first_axis("dim"),
    "Expand": _grows,
    "Repeat": _grows,
    "PackPaddedSequence": lambda node: True,
}
"""What may bring another axis to the front, by the name of its node without its ending."""


@dataclass(frozen=True)
class Role:
    """What nodes of a kind may do to rows.

    Attributes:
        describe: Describes how they move rows; None if they never do.
        turns: Tells whether one brings another axis to the front; None if none does.
        keeps_axis: Whether a node keeps the one axis that it works along, and its sizes show.
        nests: Whether they join rows in a nested tensor, or take them out of one.
    """

    describe: Callable[[Any], Move] | None
    turns: Callable[[Any], bool] | None
    keeps_axis: bool
    nests: bool


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
    turns, nests = _TURNING.get(name), name.startswith("Nested")
    if describe is None and turns is None and not nests:
        return None
    return Role(describe, turns, describe in ALONG_ONE_AXIS, nests)


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
