"""Nodes of autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.checkpoint import CheckpointFunction


def function_of(kind: type) -> type | None:
    """Return the `torch.autograd.Function` that nodes of a kind are of; or None. Torch 2.11."""
    of_function = issubclass(kind, torch.autograd.function.BackwardCFunction)
    return kind._forward_cls if of_function else None  # type: ignore[attr-defined]


_OWN: set[type] = set()
"""Functions that ghost puts into graphs."""

FunctionT = TypeVar("FunctionT", bound=type)


def own(function: FunctionT) -> FunctionT:
    """Note that a function is one that ghost puts into graphs, and no user's."""
    _OWN.add(function)
    return function


def is_custom(kind: type) -> bool:
    """Tell whether nodes of a kind are those of a user's function, not of one of ghost's."""
    function = function_of(kind)
    return function is not None and function not in _OWN


def reentrant_behind(node: Any) -> bool:
    """Tell whether a backward pass from a node comes to a reentrant checkpoint. Torch 2.11."""
    waiting, known = [node] if node is not None else [], {node}
    while waiting:
        node = waiting.pop()
        if function_of(type(node)) is CheckpointFunction:
            return True
        behind = {each for each, _ in node.next_functions if each is not None} - known
        known |= behind
        waiting += behind
    return False


class Made(NamedTuple):
    """What is known of a node's output; it has no axes where it is no result, or one number.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        device: Where it is.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def outputs_of(node: Any) -> list[Made]:
    """Return what is known of a node's outputs. Torch 2.11."""
    kinds = node._input_metadata
    return [Made(torch.Size(each.shape), each.dtype, each.device) for each in kinds]


def dtypes_into(node: Any) -> list[torch.dtype]:
    """Return the dtypes of a node's inputs that gradients go to. Torch 2.11."""
    return [each._input_metadata[at].dtype for each, at in node.next_functions if each is not None]


def number_of(value: int) -> int:
    """Return a number that a node keeps as an unsigned one, with its sign. Torch 2.11."""
    return value - 2**64 if value >= 2**63 else value


def sizes_of(node: Any) -> tuple[int, ...]:
    """Return the sizes of what an operation makes, of the first if it makes several. Torch 2.11."""
    return tuple(node._input_metadata[0].shape)


def all_sizes_of(node: Any) -> list[tuple[int, ...]]:
    """Return the sizes of all that an operation makes. Torch 2.11."""
    return [tuple(each.shape) for each in node._input_metadata]


def sizes_into(node: Any) -> list[tuple[int, ...] | None]:
    """Return the sizes of a node's inputs; None of those that no gradients go to. Torch 2.11."""
    return [
        None if each is None else tuple(each._input_metadata[at].shape)
        for each, at in node.next_functions
    ]


def is_kept_elsewhere(node: Any, name: str) -> bool:
    """Tell whether what a node keeps under a name is not at hand, as under checkpoints. Torch 2.11.

    Asking for it would run code again.
    """
    kept = getattr(node, f"_raw_saved_{name}")
    each = kept if isinstance(kept, (tuple, list)) else (kept,)
    return any(saved is not None and saved.unpack_hook is not None for saved in each)


_LEAF: type = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
"""The kind of the nodes of leaves, which lead nowhere. Torch 2.11."""


class Known(Protocol):
    """What is known of a kind of nodes."""

    @property
    def name(self) -> str:
        """What nodes of this kind are called, and maybe those of others."""

    @property
    def wanted(self) -> bool:
        """Whether they are to be found."""


KnownT = TypeVar("KnownT", bound=Known)


class Leading(dict[Any, bool]):
    """Tells which nodes of a graph lead to one of them, itself among them.

    Args:
        end: That one.
    """

    def __init__(self, end: Any) -> None:
        super().__init__({end: True, None: False})

    def note(self, node: Any, parents: Mapping[Any, Any]) -> None:
        """Take note that a node leads to the end, and so do its parents, up to those known."""
        while node not in self:
            self[node] = True
            node = parents[node]

    def __missing__(self, node: Any) -> bool:
        waiting, seen = [node], {node}
        while waiting:
            for behind, _ in waiting.pop().next_functions:
                leads = self.get(behind)
                if leads:
                    self[node] = True
                    return True
                if leads is None and type(behind) is not _LEAF and behind not in seen:
                    seen.add(behind)
                    waiting.append(behind)
        self.update(dict.fromkeys(seen, False))
        return False


class Behind(NamedTuple, Generic[KnownT]):
    """What a backward pass may run, in an order that depends on the graph alone.

    Attributes:
        nodes: The nodes that are wanted, each with what is known of its kind.
        uses: Each use of one of them, with the number of the output that is used.
        edges: The names of nodes that lead to each other, of all nodes.
        leading: Which nodes lead to the end.
    """

    nodes: dict[Any, KnownT]
    uses: list[tuple[Any, int]]
    edges: set[tuple[str, str]]
    leading: Leading


def nodes_behind(starts: Iterable[Any], kinds: Mapping[type, KnownT], end: Any) -> Behind[KnownT]:
    """Find what a backward pass from some nodes may run.

    Args:
        starts: The nodes.
        kinds: What is known of kinds of nodes.
        end: The node of a leaf.
    """
    waiting = [(node, kinds[type(node)]) for node in dict.fromkeys(starts)]
    found = {node: known for node, known in waiting if known.wanted}
    parents: dict[Any, Any] = {node: None for node, _ in waiting}
    uses: list[tuple[Any, int]] = []
    edges: set[tuple[str, str]] = set()
    leading = Leading(end)
    while waiting:
        node, known = waiting.pop()
        name = known.name
        for edge in node.next_functions:
            behind = edge[0]
            if behind is None:
                continue
            kind = type(behind)
            known = kinds[kind]
            edges.add((name, known.name))
            if kind is _LEAF:
                if behind is end:
                    leading.note(node, parents)
                continue
            if known.wanted:
                uses.append(edge)
            if behind not in parents:
                parents[behind] = node
                waiting.append((behind, known))
                if known.wanted:
                    found[behind] = known
    return Behind(found, uses, edges, leading)
