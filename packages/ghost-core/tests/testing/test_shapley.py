"""Shapley values by brute force, against the definition over orders of the players."""

from itertools import permutations

import pytest
import torch

from ghost_core.testing import shapley, subset_sums


@pytest.mark.parametrize("players", [1, 2, 4])
def test_they_are_means_over_all_orders(players):
    torch.manual_seed(players)
    utilities = torch.randn(1 << players, dtype=torch.float64)
    expected = torch.zeros(players, dtype=torch.float64)
    orders = list(permutations(range(players)))
    for order in orders:
        subset = 0
        for player in order:
            expected[player] += utilities[subset | 1 << player] - utilities[subset]
            subset |= 1 << player
    torch.testing.assert_close(shapley(utilities), expected / len(orders))


def test_sums_of_subsets():
    values = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    found = subset_sums(values, torch.tensor([0, 5, 7]))
    assert found.tolist() == [[0.0, 0.0], [101.0, 202.0], [111.0, 222.0]]
