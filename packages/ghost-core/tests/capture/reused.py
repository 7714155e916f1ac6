"""A model that calls its layers several times, with inputs and losses for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ghost_core.testing import GradientHolder

N, T, D = 4, 3, 6
Hold = Callable[..., GradientHolder]
Exact = Callable[..., None]


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (N, T, D), dtype=torch.float64)


def squares(output: Tensor) -> Tensor:
    return output.square().flatten(1).sum(1)


class Reused(nn.Module):
    """Calls one layer twice, and again in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).relu()
        for _ in range(2):
            x = self.norm(self.layer(x))
        return x
