"""Sums of dots, against adding each to zeros."""

import torch

from ghost_engines.dot_sums import DotSums

DIRECTIONS = {
    "late": torch.ones(2, 3),
    "never": torch.ones(2, 5, dtype=torch.float64),
    "early": torch.ones(2, 3, dtype=torch.float64),
}


def check(arriving, n=4):
    """Add dots by parameter and samples; compare sums, their dtypes and their order."""
    sums = DotSums(DIRECTIONS, n, 2)
    expected = {name: each.new_zeros(n, 2) for name, each in DIRECTIONS.items()}
    for name, samples, dots in arriving:
        sums.add(name, samples, dots)
        expected[name][samples] += dots
    assert list(sums.total()) == list(DIRECTIONS)
    torch.testing.assert_close(sums.total(), expected, rtol=0, atol=0)


def test_of_all_samples_and_of_nothing():
    check([(name, slice(0, 4), torch.randn(4, 2)) for name in ("early", "late")])
    check([(name, slice(0, 0), torch.randn(0, 2)) for name in ("early", "late")], n=0)


def test_several_uses_leave_each_as_it_is():
    dots = [torch.randn(4, 2, dtype=torch.float64) for _ in range(3)]
    found = [each.clone() for each in dots]
    check([("early", slice(0, 4), each) for each in dots])
    torch.testing.assert_close(dots, found, rtol=0, atol=0)


def test_micro_batches_that_are_used_twice():
    parts = [slice(0, 3), slice(3, 4)] * 2
    check([("late", each, torch.randn(each.stop - each.start, 2)) for each in parts])
