"""What moves rows between modules and the model's output, as the graph of each pass tells.

A probe proves whose each row of a module is in one pass. In later passes rows are where they were
if they come to the model's output in the same way:

    y = layer(x.flatten(0, 1))              rows 0..T-1 are of the first sample in every batch
    y = layer(x[mask]); out[mask] = y       they are if the mask leaves nothing out

Views and arithmetic leave rows where they are. What picks, joins, sorts or writes rows is looked
at: along which axis it does, and with which numbers. Within samples it may do what it likes; where
it keeps their order it does no harm; what is left identifies a pass, and is proven anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from ghost_core._torch import Leading, is_custom, nodes_behind, sizes_of
from ghost_core.split.movers import UNTOLD, Move
from ghost_core.split.roles import ROLES, Role, Turn, joins_samples, within


@dataclass(frozen=True)
class Moves:
    """What moves rows in a pass, other than within samples or in their order.

    Attributes:
        steps: The operations with their numbers, and where results are used, in the order of the
            graph.
        told: Whether these say all, so that a pass with equal ones has its rows where this has.
        picks: Whether torch picks rows or puts them somewhere, and samples are in no order in them.
        course: The kinds of operations, each with those that it leads to, and which axes are
            combined: another pass that has other ones may mix samples.
    """

    steps: tuple[object, ...] = ()
    told: bool = True
    picks: bool = False
    course: frozenset[object] = frozenset()


def find_moves(outputs: Iterable[Tensor], start: Any, n: int, *, dim: int, leading: bool) -> Moves:
    """Find what moves rows on their way from modules to the outputs of a pass.

    Of three passes of 4 samples:

        h.view(4, -1) @ w      no steps: what any pass without steps has proven
        h[arange(4), last]     one step that keeps samples in order, whatever `last` is
        h[lengths.argsort()]   one step of which nothing is told: proven anew

    Args:
        outputs: The outputs.
        start: The node that all Taps lead to.
        n: Number of samples.
        dim: Axis of the samples in the outputs.
        leading: Whether samples are on the first axis of the model's inputs and of all modules.
    """
    outputs = [output for output in outputs if output.grad_fn is not None]
    starts = [output.grad_fn for output in outputs]
    nodes, uses, edges, tapped = nodes_behind(starts, ROLES, start)
    course: frozenset[object] = frozenset(edges | _combined(nodes, tapped, n))
    for role in nodes.values():
        if role.nests:  # what has no sizes
            return Moves(told=False, course=course)
    steps = _steps(nodes, tapped, n, leading)
    untold = [node for node, step in steps.items() if len(step) == 1]
    told = not untold and _are_grouped(outputs, nodes, n, dim)
    picks = not all(is_custom(type(node)) for node in untold)
    place = {node: at for at, node in enumerate(steps)}
    used = [(place[node], number) for node, number in uses if node in place]
    return Moves((*steps.values(), *used), told, picks, course)


def _combined(nodes: Mapping[Any, Role], tapped: Leading, n: int) -> set[tuple[object, ...]]:
    """Return which axes are combined, and which views join entries of several samples.

    What combines these mixes samples. Blocks of 4 steps, `h.view(-1, 4, d)`, are of one sample each
    where samples have 8 steps; they join two where samples have 6.
    """
    found: set[tuple[object, ...]] = set()
    for node, role in nodes.items():
        if role.kept:
            found.add((role.name, *[getattr(node, name) for name in role.kept]))
        elif role.views and joins_samples(node, n) and tapped[node]:
            found.add(("joined", type(node).__name__))
    return found


def _steps(
    nodes: Mapping[Any, Role], tapped: Leading, n: int, leading: bool
) -> dict[Any, tuple[object, ...]]:
    """Return what moves rows, by node: its name, with what is known of it."""
    turned = not leading
    turns: dict[Any, Turn] = {}
    for node, role in nodes.items():
        if role.turn is None or (turned and role.describe is not None) or not tapped[node]:
            continue
        turns[node] = role.turn(node)
        turned = turned or turns[node].is_outside(n)
    steps: dict[Any, tuple[object, ...]] = {}
    for node, role in nodes.items():
        if role.describe is None:
            if turned and node in turns and turns[node].axes:
                steps[node] = role.name, turns[node].numbers(n)
        elif turned or not role.keeps_axis or not within(node, n):
            move = role.describe(node)
            axes = [axis for axis in move.along if turned or _may_hold(move.shape, axis, n)]
            if axes and any(tapped[each] for each in move.moved):
                steps[node] = role.name, *_known(move, axes, n, turned)
    return steps


def _may_hold(shape: Sequence[int], axis: int, n: int) -> bool:
    """Tell whether samples may lie along an axis, where they lead.

    If they do, the axes before it have a multiple of n entries: each along it is of one sample.
    """
    return prod(shape[:axis]) % n != 0


def _known(move: Move, axes: Sequence[int], n: int, turned: bool) -> list[object]:
    """Return what is known along axes: numbers, or the orders of samples that they keep.

    Samples are where an order is kept, if one is along any axis: else no pass were proven.
    """
    found = [(axis, move.numbers(axis, n, turned)) for axis in axes]
    return [each for each in found if each[1] is not UNTOLD]


def _are_grouped(outputs: Sequence[Tensor], nodes: Mapping[Any, Role], n: int, dim: int) -> bool:
    """Tell whether sizes show samples of equal numbers of rows, if outputs have these joined.

    They do where an axis of samples became part of the rows. A model of joined rows throughout, of
    which it knows by itself whose they are, has none.
    """
    rows = {
        size for output in outputs for size in (*output.shape[dim : dim + 1], *output.shape[:1])
    }
    if n in rows:
        return True
    for view in [node for node, role in nodes.items() if role.views]:
        before, after = view._saved_self_sym_sizes, sizes_of(view)
        joined = len(before) > 1 and n in before[:2] and before[0] * before[1] in rows
        if joined and after[:1] == (before[0] * before[1],):
            return True
    return False
