"""What takes the place of torch's functions on trees, and of its map, gives the same."""

from __future__ import annotations

import gc
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import _pytree

from ghost_core._torch import exchanged, tensors_in, tree_flatten, tree_map, vmap

Pair = namedtuple("Pair", "left right")

TREES: dict[str, Any] = {
    "a leaf": 3,
    "nothing": None,
    "empty": [],
    "nested": [1, (2, {"b": 3, "a": [4]}), OrderedDict(z=5, y=6)],
    "named": Pair(1, Pair(2, [3])),
    "torch's": torch.ones(2, 3).max(1),
    "packed": pack_sequence([torch.ones(3), torch.ones(2)]),
}


def is_packed(value: object) -> bool:
    return isinstance(value, PackedSequence)


@pytest.mark.parametrize("is_leaf", [None, is_packed])
@pytest.mark.parametrize("name", TREES)
def test_trees_are_flattened_as_by_torch(
    name: str, is_leaf: Callable[[object], bool] | None
) -> None:
    leaves, structure = tree_flatten(TREES[name], is_leaf)
    expected, same = _pytree.tree_flatten(TREES[name], is_leaf)
    assert len(leaves) == len(expected)
    assert all(one is other for one, other in zip(leaves, expected, strict=True))
    assert structure == same
    assert str(structure) == str(same)


def test_maps_keep_the_structure() -> None:
    assert tree_map(lambda leaf: leaf + 1, TREES["named"]) == Pair(2, Pair(3, [4]))


def test_tensors_are_exchanged_wherever_operations_are_given_them() -> None:
    one, other, new = torch.ones(2), nn.Parameter(torch.ones(2)), torch.zeros(2)
    given = (one, [other, (one, 3)], {"a": one}, Pair(one, 4), None, "x")
    made = exchanged(given, {id(one): new})
    assert [*map(id, tensors_in(made))] == [*map(id, (new, other, new, new, new))]
    same = _pytree.tree_map(lambda leaf: new if leaf is one else leaf, list(given))
    assert _pytree.tree_structure(made) == _pytree.tree_structure(same)
    assert exchanged((), {id(one): new}) == []


def rows(given: list[Tensor]) -> list[Tensor]:
    x, y = given
    return [x.sin() @ y, torch.dropout(x, 0.5, train=True)]


def test_vmap_is_torchs() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    torch.manual_seed(0)
    found = vmap(rows, [x, y], "different")
    torch.manual_seed(0)
    expected = torch.vmap(lambda *each: rows(list(each)), randomness="different")(x, y)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(rows, [x, y], "error")


def test_no_cycles_are_left() -> None:
    def left() -> int:
        gc.collect()
        for tree in TREES.values():
            tree_map(lambda leaf: leaf, tree)
        vmap(rows, [torch.randn(5, 3), torch.randn(5, 3)], "different")
        return gc.collect()

    gc.disable()
    try:
        # What torch sets up at its first call, and what other threads leave, comes now and then.
        assert min(left() for _ in range(5)) == 0
    finally:
        gc.enable()


class Marked(Tensor):
    """A tensor of another class."""


def test_tensors_are_found_wherever_torch_finds_leaves() -> None:
    given = torch.ones(2), nn.Parameter(torch.ones(3)), torch.ones(1).as_subclass(Marked)
    sizes = {
        "size": given[0].shape,
        "part": (slice(2), ..., None),
        "last": [given[1], {"x": given}],
    }
    for tree in (*TREES.values(), given, given[0], sizes, Pair(given, sizes)):
        expected = [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
        found = tensors_in(tree)
        assert list(map(id, found)) == list(map(id, expected))
