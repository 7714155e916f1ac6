"""Gradients that are taken back without the graph are those that the graph tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghost_core.capture.ways_back import WayBack, way_back
from ghost_core.model_hooks import Hook

INDEX = torch.tensor([[0, 3, 3], [5, -1, 1]])
WHOLE = slice(None)

MOVES: dict[str, tuple[Any, ...]] = {
    "gathered": (Tensor.__getitem__, INDEX),
    "gathered by columns": (Tensor.__getitem__, (WHOLE, INDEX.clamp(-1, 2))),
    "one": (Tensor.__getitem__, torch.tensor(2)),
    "one column": (Tensor.__getitem__, (WHOLE, torch.tensor(2))),
    "none of it": (Tensor.__getitem__, torch.zeros(0, dtype=torch.int64)),
    "with a new axis": (Tensor.__getitem__, None),
    "with new axes": (Tensor.__getitem__, (None, WHOLE, None)),
    "permuted": (Tensor.permute, 2, 0, -2),
    "permuted as told": (torch.permute, (1, 2, 0)),
    "viewed": (Tensor.view, 4, -1),
    "flattened": (torch.flatten, 1),
    "squeezed": (torch.squeeze,),
}

OTHERS: dict[str, tuple[Any, ...]] = {
    "scaled": (torch.mul, 2),
    "a part": (Tensor.__getitem__, (slice(2),)),
    "two indices": (Tensor.__getitem__, (INDEX, INDEX.clamp(0, 1))),
    "masked": (Tensor.__getitem__, torch.tensor([True, False, True, True, False, True])),
    "behind a new axis": (Tensor.__getitem__, (None, INDEX)),
}


def made(case: tuple[Any, ...]) -> tuple[Tensor, Tensor, WayBack | None]:
    func, *others = case
    given = torch.randn(6, 4, 2, requires_grad=True)
    value = func(given, *others)
    return given, value, way_back(func, (given, *others), given, value)


@pytest.mark.parametrize("name", MOVES)
def test_gradients_are_taken_back_as_by_the_graph(name: str) -> None:
    given, value, way = made(MOVES[name])
    gradients = torch.randn(3, *value.shape)
    assert way is not None
    assert way.is_open
    rows = [torch.autograd.grad(value, given, each, retain_graph=True)[0] for each in gradients]
    torch.testing.assert_close(way.take(gradients), torch.stack(rows))


@pytest.mark.parametrize("name", OTHERS)
def test_what_may_do_more_is_left_to_the_graph(name: str) -> None:
    assert made(OTHERS[name])[2] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_what_is_seen_as_another_dtype_is_left_to_the_graph(dtype: torch.dtype) -> None:
    given = torch.randn(4, dtype=torch.float64)
    assert way_back(Tensor.view, (given, dtype), given, given.view(dtype)) is None


def test_what_moves_entries_of_another_value_is_left_to_the_graph() -> None:
    other, given, _ = made(MOVES["viewed"])
    assert way_back(torch.permute, (other, (0, 1)), given, given.permute(0, 1)) is None


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_way_is_closed_once_something_was_written_to(written: int) -> None:
    index = INDEX.clone()
    given, value, way = made((Tensor.__getitem__, index))
    assert way is not None
    with torch.no_grad():
        (given, value, index)[written].view(-1)[0].add_(1)
    assert not way.is_open


@pytest.mark.parametrize("hooked", [0, 1])
def test_a_way_is_closed_by_hooks_that_may_change_gradients(
    hooked: int,
) -> None:
    given, value, way = made(MOVES["gathered"])
    assert way is not None
    (given, value)[hooked].register_hook(torch.neg)
    assert not way.is_open


def test_hooks_of_ghosts_own_change_nothing() -> None:
    given, _, way = made(MOVES["gathered"])
    assert way is not None
    given.register_hook(Hook(lambda _: None))
    assert way.is_open
