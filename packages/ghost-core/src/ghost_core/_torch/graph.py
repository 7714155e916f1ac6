"""Nodes of autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch


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


def sizes_into(node: Any) -> list[torch.Size | None]:
    """Return the sizes of a node's inputs; None of those that no gradients go to. Torch 2.11."""
    return [
        None if each is None else torch.Size(each._input_metadata[at].shape)
        for each, at in node.next_functions
    ]


def is_kept_elsewhere(node: Any, name: str) -> bool:
    """Tell whether what a node keeps under a name is not at hand, as under checkpoints. Torch 2.11.

    Asking for it would run code again.
    """
    kept = getattr(node, f"_raw_saved_{name}")
    each = kept if isinstance(kept, (tuple, list)) else (kept,)
    return any(saved is not None and saved.unpack_hook is not None for saved in each)


class Behind(NamedTuple):
    """What a backward pass may run, in an order that depends on the graph alone.

    Attributes:
        nodes: The nodes of the kinds that were asked for.
        uses: Each use of one of them, with the number of the output that is used.
        edges: The kinds of nodes that lead to each other, of all nodes.
    """

    nodes: list[Any]
    uses: list[tuple[Any, int]]
    edges: set[tuple[type, type]]


def nodes_behind(starts: Iterable[Any], wanted: Mapping[type, object]) -> Behind:
    """Find what a backward pass from some nodes may run, and nodes of wanted kinds. Torch 2.11."""
    waiting = list(dict.fromkeys(node for node in starts if node is not None))
    seen, found = set(waiting), [node for node in waiting if wanted[type(node)]]
    uses: list[tuple[Any, int]] = []
    edges: set[tuple[type, type]] = set()
    while waiting:
        node = waiting.pop()
        leading = type(node)
        for behind, number in node.next_functions:
            if behind is None:
                continue
            kind = type(behind)
            edges.add((leading, kind))
            is_new = behind not in seen
            if is_new:
                seen.add(behind)
                waiting.append(behind)
            if wanted[kind]:
                uses.append((behind, number))
                if is_new:
                    found.append(behind)
    return Behind(found, uses, edges)


def leads_to(node: Any, end: Any) -> bool:
    """Tell whether one node leads to another. Torch 2.11."""
    waiting, seen = [node], {node}
    while waiting:
        for behind, _ in waiting.pop().next_functions:
            if behind is end:
                return True
            if behind is not None and behind not in seen:
                seen.add(behind)
                waiting.append(behind)
    return False
