"""Trees and vmap as torch has them, without its reference cycles.

The helpers of torch's own know themselves: what they hold waits for the collector, and so does
memory. The private names here are in torch 2.11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import vmap as _functorch
from torch.utils import _pytree

from ghost_core.restoring import restored


def tree_flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], _pytree.TreeSpec]:
    """Return the leaves of a tree and its structure, for torch's `tree_unflatten`. Torch 2.11."""
    leaves: list[Any] = []
    return leaves, _structure(tree, leaves, is_leaf)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a tree, in order.

    What operations are given is looked at one by one, and is tuples and lists of tensors and
    numbers nearly always, for which torch's own helpers take many times as long.
    """
    found: list[Tensor] = []
    _collect(tree if type(tree) in _CONTAINERS else (tree,), found)
    return found


_TENSORS = frozenset({Tensor, nn.Parameter})
_CONTAINERS = frozenset({tuple, list})
NUMBERS = frozenset(
    {
        int,
        float,
        bool,
        str,
        complex,
        type(None),
        torch.dtype,
        torch.device,
        torch.Size,
        EllipsisType,
        slice,
    }
)
"""Types without tensors in them; of their subclasses nothing is known.

The bounds of a slice are whole numbers, of which nothing has a gradient, and its tree is a leaf."""


def _collect(nodes: Iterable[Any], found: list[Tensor]) -> None:
    for node in nodes:
        kind = type(node)
        if kind in _TENSORS:
            found.append(node)
        elif kind in NUMBERS:
            continue
        elif kind in _CONTAINERS:
            _collect(node, found)
        elif kind is dict:
            _collect(node.values(), found)
        elif isinstance(node, Tensor):
            found.append(node)
        else:
            found += [leaf for leaf in _pytree.tree_leaves(node) if isinstance(leaf, Tensor)]


def exchanged(nodes: Iterable[Any], others: Mapping[int, Tensor]) -> list[Any]:
    """Return what an operation is given, with other tensors in place of some.

    Args:
        nodes: What it is given, in which trees are looked into as `tensors_in` does.
        others: What takes the place of tensors, by their identities.
    """
    made: list[Any] = []
    for node in nodes:
        kind = type(node)
        if kind in _TENSORS:
            made.append(others.get(id(node), node))
        elif kind in NUMBERS:
            made.append(node)
        elif kind in _CONTAINERS:
            made.append(kind(exchanged(node, others)))
        else:
            made.append(tree_map(lambda leaf: others.get(id(leaf), leaf), node))
    return made


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree with other leaves. Torch 2.11."""
    if isinstance(tree, Tensor):
        return function(tree)
    leaves, structure = tree_flatten(tree)
    return _pytree.tree_unflatten([function(leaf) for leaf in leaves], structure)


def _structure(
    node: Any, leaves: list[Any], is_leaf: Callable[[Any], bool] | None
) -> _pytree.TreeSpec:
    kind = _pytree._get_node_type(node)
    if kind not in _pytree.SUPPORTED_NODES or (is_leaf is not None and is_leaf(node)):
        leaves.append(node)
        return _pytree._LEAF_SPEC
    children, context = _pytree.SUPPORTED_NODES[kind].flatten_fn(node)
    inside = [_structure(child, leaves, is_leaf) for child in children]
    return _pytree.TreeSpec(kind, context, inside)


def vmap(
    function: Callable[[list[Tensor]], Sequence[Tensor]], given: Sequence[Tensor], randomness: str
) -> list[Tensor]:
    """Run a function of a row of each tensor on all rows at once, as `torch.vmap` does. Torch 2.11.

    Args:
        function: Takes a list of tensors, and returns tensors.
        given: The tensors, all with as many rows, at least one.
        randomness: What to do where random numbers are drawn, as `torch.vmap` takes it.
    """
    _functorch.lazy_load_decompositions()  # type: ignore[attr-defined]
    count = len(given[0])
    with restored() as stack:
        nesting = _functorch.vmap_increment_nesting(count, randomness)
        level = stack.enter_context(nesting)
        rows = [torch._C._functorch._add_batch_dim(each, 0, level) for each in given]
        made = function(rows)
        return [torch._C._functorch._remove_batch_dim(each, level, count, 0) for each in made]
