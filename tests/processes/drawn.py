"""Drawn runs in concatenated mode: each process goes through layers of its own, in its order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.processes.training import losses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghost_engines import DotProductEngine

LAYERS, TRIALS, WORLD = 5, 12, 2


class Ways(nn.Module):
    """Goes through some of its layers, in any order, any number of times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(LAYERS)])
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor, order: Sequence[int]) -> Tensor:
        """Return outputs, `[N, 1]`."""
        for at in order:
            inputs = self.layers[at](inputs).tanh() + inputs
        return self.head(inputs)


@dataclass(frozen=True)
class Trial:
    """What the processes do.

    Attributes:
        orders: The layers of each.
        train: Training samples of each, `[N, 3]`; N may be zero.
        held_out: Validation samples of each.
        options: Options of the wrapper.
    """

    orders: list[list[int]]
    train: list[Tensor]
    held_out: list[Tensor]
    options: dict[str, Any]


def trial(seed: int) -> Trial:
    """Draw a trial, the same in all processes."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    orders = [[draw.randrange(LAYERS) for _ in range(draw.randrange(1, 5))] for _ in range(WORLD)]
    sizes = [[draw.randrange(rank == 1, 5) for rank in range(WORLD)]]
    sizes.append([draw.randrange(1, 4) for _ in range(WORLD)])
    train, held_out = (
        [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in each]
        for each in sizes
    )
    options = {
        "find_unused_parameters": True,
        "gradient_as_bucket_view": draw.random() < 0.5,
        "bucket_cap_mb": draw.choice([25, 1e-5, 1e-4]),
    }
    return Trial(orders if seed % 4 else orders[:1] * WORLD, train, held_out, options)


def model() -> Ways:
    """Return the same model each time."""
    torch.manual_seed(7)
    return Ways().double()


def run(rank: int) -> list[dict[str, Any]]:
    """Return what a process finds in the second of two batches of each trial."""
    found = []
    for each in map(trial, range(TRIALS)):
        inner, train, held_out = model(), each.train[rank], each.held_out[rank]
        wrapped = DistributedDataParallel(inner, **each.options)
        engine = DotProductEngine(wrapped, mode="concatenated", norms=True)
        with engine:
            for _ in range(2):
                inner.zero_grad()
                both = engine.concatenate(train, held_out)
                with engine.batch(range(len(train))) as batch:
                    engine.backward(
                        losses(wrapped(both, each.orders[rank])),
                        train_weight=1 / max(1, len(train)),
                        validation_weight=1 / len(held_out),
                    )
        found.append(
            {
                "scores": batch.result.total.flatten().tolist(),
                "cosines": batch.result.cosines.flatten().tolist(),
                "gradient": torch.cat(list(gradients(inner).values())).tolist(),
            }
        )
    return found


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return what is in `.grad`, flat, zeros where there is nothing."""
    return {
        name: (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten()
        for name, leaf in module.named_parameters()
    }
