from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ghost_core.testing import GradientHolder
from ghost_layers.replay import Way

from .modules import Behind, Experts, Gated, Head, Scaled, check, doubles, losses, registry


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.table[: x.shape[1] + 1]


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(4))
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one + self.other.sin()


class Unused(nn.Module):
    """Has an embedding for masked positions, which it draws with numpy in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mask = torch.as_tensor(np.random.rand(*x.shape[:2]) < 0.5)
            x = torch.where(mask[..., None], self.masked, x)
        return 2 * x if random.random() < 0.5 else 3 * x


MODULES: dict[str, tuple[Callable[[], nn.Module], list[Way]]] = {
    "tokens": (Tokens, [Way.VMAP]),
    "experts": (Experts, [Way.BATCH]),
    "experts with a capacity": (lambda: Experts(capacity=2), [Way.BATCH]),
    "head": (Head, [Way.VMAP]),
    "twins": (Twins, [Way.VMAP]),
    "gated": (lambda: Gated(0.5), [Way.VMAP]),
    "gates near zero": (lambda: nn.Sequential(Gated(1e-6), Gated(0.0)), [Way.VMAP] * 2),
    "random masks": (Unused, [Way.BATCH]),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("frozen", [False, True])
def test_bare_parameters(kind: str, frozen: bool, ways: list[Way]) -> None:
    make, expected = MODULES[kind]
    check(Seeded(Behind(make())).double(), doubles(4, 3, 4), frozen=frozen)
    assert ways == expected


class Seeded(nn.Module):
    """Seeds the generators that are not torch's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        np.random.seed(0)
        random.seed(0)
        return self.model(*inputs)


def test_unused_parameter_has_no_gradient() -> None:
    model = Seeded(Behind(Unused())).double().eval()
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine, engine.batch(range(3)) as batch:
        losses(model(doubles(3, 2, 4))).sum().backward()
    held = batch.result.materialize()
    assert not held["model.module.masked"].any()
    assert held["model.linear.weight"].any()


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("layers", ["module.gate", "*"])
def test_dropout(n: int, layers: str) -> None:
    check(Behind(Gated(1e-6)).double(), doubles(n, 3, 4), layers=layers)


def test_several_parameters_in_a_tied_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.PReLU(), nn.PReLU()
            self.second.weight = self.first.weight
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.linear(self.first(self.linear(x))) + 0.1)

    check(Tied().double(), doubles(4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [4, 160])
@pytest.mark.parametrize("frozen", [False, True])
def test_recurrent_layer_inside(
    dtype: torch.dtype, width: int, frozen: bool, ways: list[Way]
) -> None:
    # In float32, its kernel asks whether it is to be differentiated.
    class Recurs(Gated):
        def __init__(self) -> None:
            super().__init__(0.1)
            self.layer = nn.LSTM(4, width, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate[:3].sum() * self.layer(x)[0].sum(-1, keepdim=True)

    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    model = Behind(Recurs()).to(dtype)
    inputs = torch.randn(3, 5, 4, dtype=dtype)
    check(model, inputs, layers="*gate,linear", frozen=frozen, tolerance=tolerance)
    assert ways == [Way.BATCH]


def test_derivatives_in_the_forward_pass(ways: list[Way]) -> None:
    def slope(module: Scaled, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        energy = (x * module.scale).sin().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    check(Behind(Scaled(slope)).double(), doubles(3, 4))
    assert ways == [Way.BATCH]
