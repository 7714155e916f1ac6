"""Samples and parameters that are written into tensors made before: exact, frozen too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tests.foreign.foreign import WAYS, Foreign, check, curved
from torch import Tensor, nn

Fill = Callable[[Tensor, Tensor], Tensor]


def zeros(y: Tensor) -> Tensor:
    return torch.zeros(len(y), y.shape[1] + 1, y.shape[2], dtype=y.dtype)


def samples(y: Tensor, row: Tensor) -> Tensor:
    made = zeros(y)
    made[:, 1:] = y
    return made


def through_a_view(y: Tensor, row: Tensor) -> Tensor:
    made = zeros(y)
    made[:, 1:].copy_(y)
    return made


def seen_by_a_view(y: Tensor, row: Tensor) -> Tensor:
    made = zeros(y)
    seen = made.view_as(made)
    made[:, 1:] = y
    return seen


def by_mask(y: Tensor, row: Tensor) -> Tensor:
    made = zeros(y)
    there = torch.ones(made.shape[:2], dtype=torch.bool)
    there[:, 0] = False
    made[there] = y.flatten(0, 1)
    return made


def parameter_first(y: Tensor, row: Tensor) -> Tensor:
    made = zeros(y)
    made[:, 0] = row
    made[:, 1:] = y
    return made


def parameter_last(y: Tensor, row: Tensor) -> Tensor:
    made = zeros(y)
    made[:, 1:] = y
    made[:, 0] = row
    return made


def parameter_in_a_table(y: Tensor, row: Tensor) -> Tensor:
    table = torch.zeros(y.shape[1:], dtype=y.dtype)
    table[0] = row
    return y + table


def parameter_through_a_view(y: Tensor, row: Tensor) -> Tensor:
    table = torch.zeros(y.shape[1:], dtype=y.dtype)
    table[:1].copy_(row[None])
    return y + table


def part_of_a_copy(y: Tensor, row: Tensor) -> Tensor:
    copy = row.clone()
    copy[2:4] = 0
    return y + copy


FILLS: tuple[Fill, ...] = (
    samples,
    through_a_view,
    seen_by_a_view,
    by_mask,
    parameter_first,
    parameter_last,
    parameter_in_a_table,
    parameter_through_a_view,
    part_of_a_copy,
)


class Filled(nn.Module):
    """A layer, a tensor that is filled from its output and a parameter, and layers behind."""

    def __init__(self, fill: Fill) -> None:
        super().__init__()
        self.layer, self.behind, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.row, self.fill = nn.Parameter(torch.randn(8)), fill

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self.fill(self.layer(x), self.row)).tanh())


class InPlace(nn.Module):
    """What a layer computed from nothing of the samples is written to by what follows."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.layer, self.table, self.part = nn.Linear(3, 8), nn.Linear(2, 8), part

    def forward(self, x: Tensor) -> Tensor:
        table = self.table(torch.linspace(-1, 1, 10, dtype=x.dtype).view(5, 2))
        written = table.view(-1)[:20] if self.part else table
        written.relu_()
        return (self.layer(x) + table).tanh()


def _sequences(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 5, 3)}


def _curved(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return curved(model(batch["x"]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fill", FILLS)
def test_what_is_written_into_other_tensors_is_followed(fill: Fill, way: str) -> None:
    check(Foreign(fill.__name__, partial(Filled, fill), _sequences, _curved), way)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", [False, True])
def test_what_is_shared_may_be_written_to(part: bool, way: str) -> None:
    check(Foreign("in place", partial(InPlace, part), _sequences, _curved), way)  # type: ignore[arg-type]
