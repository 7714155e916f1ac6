"""Which rows a gradient reached, and where there is NaN, entry by entry."""

import pytest
import torch
from torch import Tensor

from ghost_core.split import RowAxes, Site
from ghost_core.split.nan import has_nan, is_finite

NAN, INF = float("nan"), float("inf")
LEAST = 2.0**-133  # of bfloat16, and no normal number of float32

ROWS = {
    "nothing": ([0.0, -0.0, 0.0], False),
    "below zero": ([0.0, -1.0, -2.0], True),
    "nan among others": ([3.0, NAN, -INF], True),
    "nan alone": ([0.0, 0.0, NAN], True),
    "infinite": ([-INF, 0.0, INF], True),
    "the least there is": ([0.0, LEAST, 0.0], True),
}


def reached(grad: Tensor, axis: int) -> list[int]:
    site = Site(("module",), "", [RowAxes(axis, (axis,), grad.shape[axis])])
    return [row for _, rows in site.reached([grad]) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_not_zero_are_reached(name, axis, dtype):
    entries, hit = ROWS[name]
    grad = torch.zeros(4, 2, 3, dtype=dtype)
    grad[2, 1], grad[0, 0, 0] = torch.tensor(entries, dtype=dtype), -1.0
    rows = grad.movedim(0, axis)
    assert reached(rows, axis) == ([0, 2] if hit else [0])


@pytest.mark.parametrize(("shape", "axis"), [((3, 0), 0), ((0, 3), 0), ((0, 3), 1)])
def test_what_has_no_entries_is_not_reached(shape, axis):
    assert reached(torch.zeros(shape), axis) == []


def test_a_row_of_one_number():
    assert reached(torch.tensor([0.0, -1.0, NAN, 0.0]), 0) == [1, 2]


@pytest.mark.parametrize("name", ROWS)
def test_nan_and_infinity_are_told_apart(name):
    values = torch.tensor(ROWS[name][0])
    assert has_nan(values) == bool(values.isnan().any())
    assert is_finite(values) == bool(values.isfinite().all())
    assert not has_nan(values[:0])
    assert is_finite(values[:0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_is_found_among_numbers_of_eight_bits(dtype):
    """Of which torch finds no largest one; a model may return such."""
    values = torch.tensor([0.0, -1.0]).to(dtype)
    assert not has_nan(values)
    assert has_nan(torch.tensor([0.0, NAN]).to(dtype))
