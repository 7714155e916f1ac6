"""Inputs for the layers that samplers are tried on."""

from __future__ import annotations

import torch
from torch import Tensor

N, T, D, P = 4, 3, 5, 6


def sequence() -> Tensor:
    return torch.randn(N, T, D)


def token_ids() -> Tensor:
    ids = torch.randint(0, 7, (N, 6))
    ids[:, 1] = ids[:, 0]
    ids[:, 2] = 3
    return ids
