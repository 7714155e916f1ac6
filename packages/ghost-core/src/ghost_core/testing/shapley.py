"""Shapley values by brute force: what each of a few players adds, over all subsets of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shapley(utilities: Tensor) -> Tensor:
    """Return the Shapley values of N players, float64 `[N]`.

    Args:
        utilities: What each subset is worth, `[2^N]`: player n is in subset s if bit n of s is set.
    """
    players = (len(utilities) - 1).bit_length()
    subsets = torch.arange(len(utilities))
    sizes = torch.stack([(subsets >> n) & 1 for n in range(players)]).sum(0)
    weights = torch.tensor(
        [1 / (players * math.comb(players - 1, size)) for size in range(players)],
        dtype=torch.float64,
    )
    values = []
    for n in range(players):
        without = subsets[(subsets >> n) & 1 == 0]
        gained = utilities[without | (1 << n)] - utilities[without]
        values.append((weights[sizes[without]] * gained).sum())
    return torch.stack(values)


def subset_sums(values: Tensor, subsets: Tensor) -> Tensor:
    """Return the sum of some players' values for each subset, `[S, *shape]`.

    Args:
        values: One for each player, `[N, *shape]`.
        subsets: Numbers of subsets, as `shapley` counts them, `[S]`.
    """
    inside = torch.stack([(subsets >> n) & 1 for n in range(len(values))], 1)
    sums: Tensor = torch.tensordot(inside.to(values.dtype), values, 1)
    return sums
