"""Modules that are run again for their gradients: attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bench.case import Case, Setting, Way
from bench.steps import plain, scored, unscored


class Alone(nn.Module):
    """Attention and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Let all tokens of a sample attend to each other, `[N, T, d]`."""
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


class Block(nn.Module):
    """A pre-norm block with torch's own attention, which is run again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each token, `[N, T, d]`."""
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        transformed: Tensor = self.down(self.up(self.second(x)).relu())
        return x + transformed


def steps(kind: type[nn.Module], setting: Setting) -> Mapping[str, Way]:
    """Make a plain step of a model of width d, and a scored one."""
    n, length, width = (4, 6, 8) if setting.tiny else (16, 64, 128)
    model = kind(width).to(setting.device)
    x = torch.randn(n, length, width, device=setting.device, requires_grad=True)

    def loss(model: nn.Module) -> Tensor:
        y: Tensor = model(x)
        return y.square().mean()

    return {
        "plain": plain(model, loss),
        "run again": unscored(setting, model, loss, n),
        "exact": scored(setting, model, loss, n),
    }


CASES = [
    Case(
        "attention_alone",
        "nn.MultiheadAttention, which is run again: N = 16, T = 64, d = 128, with dots and without",
        partial(steps, Alone),
        goals={"run again": 2.0, "exact": 2.0},  # a forward and a backward pass of it more
    ),
    Case(
        "attention_block",
        "a transformer block around it: N = 16, T = 64, d = 128, dots",
        partial(steps, Block),
    ),
]
