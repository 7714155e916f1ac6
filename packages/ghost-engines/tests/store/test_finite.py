"""The fast check for numbers that are not finite against torch's."""

import pytest
import torch

from ghost_engines.store.finite import all_finite

BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    expected = numbers.isfinite()
    assert [all_finite(number) for number in numbers.split(1)] == expected.tolist()
    assert all_finite(numbers[expected])
    assert not all_finite(numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_at_the_edges(dtype):
    most = torch.finfo(dtype).max
    edges = torch.tensor([0.0, -0.0, most, -most, torch.finfo(dtype).tiny, 5e-324], dtype=dtype)
    assert all_finite(edges)
    for value in (float("inf"), -float("inf"), float("nan")):
        for at in range(len(edges)):
            spoilt = edges.clone()
            spoilt[at] = value
            assert not all_finite(spoilt)
    payload = torch.full((3,), -1, dtype=BITS[dtype]).view(dtype)  # NaN, with all bits set
    assert not all_finite(payload)


@pytest.mark.parametrize("dtype", BITS)
def test_no_numbers_are_finite(dtype):
    assert all_finite(torch.empty(0, 3, dtype=dtype))
