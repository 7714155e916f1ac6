"""A parameter that a replayed call does not use has no gradient in modes that make gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ghost_engines import DotProductEngine

from .compare import drawn, squares


class Spare(nn.Module):
    """Runs again for its gradients, and leaves one of its parameters alone."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.way = nn.Linear(3, 3), way
        self.used, self.spare = nn.Parameter(drawn(3)), nn.Parameter(drawn(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.way == "checkpointed":
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(functional.dropout(x) if self.way == "drawing" else x)

    def run(self, x: Tensor) -> Tensor:
        if self.way == "row by row":  # not under vmap
            return torch.stack(
                [row if row.sum() > 9 else torch.maximum(row, self.used) for row in x]
            )
        return torch.maximum(x, self.used) * x


@pytest.mark.parametrize("way", ["at once", "row by row", "drawing", "checkpointed"])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("mode", ["fused", "concatenated"])
def test_it_stays_none(mode: str, verify: bool, way: str) -> None:
    """Weight decay would move the parameter, were its gradient zero."""
    torch.manual_seed(0)
    model, x = Spare(way), drawn(4, 3)
    engine = DotProductEngine(model, mode=mode, verify=verify)
    if mode == "fused":
        engine.add_direction("all", {name: p.detach() for name, p in model.named_parameters()})
    with engine:
        for _ in range(2):
            model.zero_grad()
            both = engine.concatenate(x, x) if mode == "concatenated" else x
            with engine.batch(range(4)) as batch:
                losses = squares(model(both))
                if mode == "fused":
                    losses.sum().backward()
                else:
                    engine.backward(losses, train_weight=1, validation_weight=1)
            assert model.spare.grad is None
            assert model.used.grad is not None
            assert not batch.result.by_parameter["spare"].any()
            assert batch.result.by_parameter["used"].any()
