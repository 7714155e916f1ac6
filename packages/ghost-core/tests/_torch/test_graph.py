"""What a walk over autograd's graph finds."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ghost_core._torch import Leading, nodes_behind


class Kind(NamedTuple):
    """What is known of a kind of nodes."""

    name: str
    wanted: bool


class Kinds(dict[type, Kind]):
    """Calls products and sums by a name of theirs, and wants views."""

    def __missing__(self, kind: type) -> Kind:
        name = kind.__name__
        return Kind("Arithmetic" if name[:3] in ("Add", "Mul") else name, "View" in name)


def graph(seed: int) -> tuple[list[Tensor], Tensor]:
    """Return outputs of some operations on leaves, and the leaf that only some depend on."""
    draw, end = random.Random(seed), torch.ones((), requires_grad=True)
    values = [torch.ones(2, 3, requires_grad=True) for _ in range(3)]
    for _ in range(30):
        one, other = draw.choices(values[-6:], k=2)
        made = [one + other, one * other, one.view(6).view(2, 3), one * end, (one + other).detach()]
        values.append(draw.choices(made, [4, 4, 4, 1, 1])[0])
    return [each for each in values[-3:] if each.grad_fn is not None], end


def reached(node: Any) -> set[Any]:
    """Return a node and all behind it."""
    return {node}.union(*(reached(each) for each, _ in node.next_functions if each is not None))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_behind_nodes_is_found(seed: int) -> None:
    outputs, leaf = graph(seed)
    starts = [output.grad_fn for output in outputs]
    end = torch.autograd.graph.get_gradient_edge(leaf).node
    everything = set[Any]().union(*(reached(node) for node in starts))
    edges = [(a, b, at) for a in everything for b, at in a.next_functions if b is not None]
    kinds = Kinds()

    nodes, uses, named, leading = nodes_behind([*starts, *starts], kinds, end)

    assert nodes.keys() == {node for node in everything if kinds[type(node)].wanted}
    assert all(known == kinds[type(node)] for node, known in nodes.items())
    wanted = [(b, at) for _, b, at in edges if b in nodes]
    assert sorted(uses, key=repr) == sorted(wanted, key=repr)
    assert named == {(kinds[type(a)].name, kinds[type(b)].name) for a, b, _ in edges}
    for told in (leading, Leading(end)):
        assert {node for node in everything if told[node]} == {
            node for node in everything if end in reached(node)
        }


def test_what_leads_nowhere_does_not_lead_to_the_end() -> None:
    end = torch.autograd.graph.get_gradient_edge(torch.ones((), requires_grad=True)).node
    assert not Leading(end)[None]
    assert Leading(end)[end]
