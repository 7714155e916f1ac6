from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghost_layers.replay.closeness import are_close, same_rows

DOUBLE, SINGLE = [torch.float64], [torch.float64, torch.float32]
ROWS = torch.tensor([[1.0, 100.0], [1e-3, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], True),
        ([[5e-8, 0.0], [0.0, 0.0]], True),  # beside 100
        ([[0.0, 0.0], [5e-8, 0.0]], False),  # beside 1e-3
        ([[float("nan"), 0.0], [0.0, 0.0]], False),
    ],
)
def test_rows_are_compared_with_their_largest_entry(change: list[list[float]], same: bool) -> None:
    assert same_rows(ROWS + ROWS.new_tensor(change), ROWS, DOUBLE) is same


def test_rows_may_be_single_numbers() -> None:
    rows = ROWS[:, 0]
    assert same_rows(rows * (1 + 1e-13), rows, DOUBLE)
    assert not same_rows(rows + 1e-6, rows, DOUBLE)


def test_narrowest_dtype_says_how_exact() -> None:
    off = ROWS * (1 + 1e-6)
    assert not same_rows(off, ROWS, DOUBLE)
    assert same_rows(off, ROWS, SINGLE)


@pytest.mark.parametrize("got", [ROWS.float(), ROWS[:, :1], torch.cat([ROWS, ROWS])])
def test_what_looks_different_is_not_the_same(got: Tensor) -> None:
    assert not same_rows(got, ROWS, SINGLE)


def test_values_that_are_no_numbers_are_the_same_where_both_have_them() -> None:
    rows = ROWS.clone()
    rows[0, 0], rows[1, 1] = float("nan"), float("inf")
    assert same_rows(rows.clone(), rows, DOUBLE)
    assert same_rows(rows * (1 + 1e-12), rows, DOUBLE)


def test_one_row_stands_for_any_number() -> None:
    assert same_rows(ROWS[:1].expand(3, 2), ROWS[:1], DOUBLE)


def test_no_entries_are_the_same() -> None:
    assert same_rows(ROWS[:, :0], ROWS[:, :0], DOUBLE)


def test_small_gradients_are_measured_against_the_whole() -> None:
    expected = {"weight": torch.ones(4, dtype=torch.float64), "bias": torch.full((1,), 1e-14)}
    assert are_close(expected | {"bias": torch.full((1,), 2e-14)}, expected, DOUBLE)
    assert not are_close(expected | {"bias": torch.full((1,), 1e-9)}, expected, DOUBLE)
    assert not are_close(expected | {"weight": expected["weight"] * 1.001}, expected, DOUBLE)
