"""Processes that go through other layers, in another order, find what one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.processes.conftest import started
from tests.processes.drawn import TRIALS, WORLD, Trial, gradients, model, trial
from tests.processes.training import losses
from torch import Tensor


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    return started(tmp_path_factory.mktemp("drawn"), "drawn")


def flat_gradient(order: list[int], inputs: Tensor, weight: float) -> Tensor:
    """Return the gradient of the sum of weighted losses, all parameters in one."""
    net = model()
    (losses(net(inputs, order)).sum() * weight).backward()
    return torch.cat(list(gradients(net).values()))


def wanted(each: Trial, rank: int) -> dict[str, Tensor]:
    """Return what one process finds."""
    direction, mean = (
        torch.stack(
            [
                flat_gradient(order, inputs, 1 / max(1, len(inputs)))
                for order, inputs in zip(each.orders, samples, strict=True)
            ]
        ).mean(0)
        for samples in (each.held_out, each.train)
    )
    train = each.train[rank]
    parts = [flat_gradient(each.orders[rank], one[None], 1 / len(train) / WORLD) for one in train]
    rows = torch.stack(parts) if parts else torch.zeros(0, len(mean), dtype=mean.dtype)
    scores = rows @ direction
    cosines = scores / rows.norm(dim=1) / direction.norm()
    return {"scores": scores, "cosines": cosines, "gradient": mean}


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(TRIALS))
def test_processes_that_go_other_ways(drawn: list[dict[str, Any]], seed: int) -> None:
    for rank, found in enumerate(drawn):
        for name, expected in wanted(trial(seed), rank).items():
            got = torch.tensor(found["drawn"][seed][name], dtype=torch.float64)
            assert got.shape == expected.shape, name
            assert float((got - expected).norm()) <= 1e-9 * float(expected.norm()), name
