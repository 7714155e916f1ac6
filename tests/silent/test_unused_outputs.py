"""A branch that the loss does not use gets no gradients, no hooks and no steps from ghost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.silent.compare import assert_training_untouched, drawn, squares
from torch import Tensor, nn

from ghost_core.testing import GradientHolder

N, D = 4, 6


class Squares(torch.autograd.Function):
    """A function with a backward pass of its own, which is given zeros where nothing arrives."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.square().sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad[:, None] * ctx.saved_tensors[0]


class TwoOutputs(nn.Module):
    """Returns two results, of which the model uses one.

    Args:
        how: What makes the other one.
        seen: Where a hook notes what it is given.
    """

    def __init__(self, how: str, seen: list[Tensor | None]) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(D, D), nn.Parameter(drawn(D, D))
        self.how, self.seen = how, seen

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        factor = Squares.apply(self.weight) if self.how == "function" else self.weight.sum(1)
        other = x * factor
        if self.how == "hook":
            other.register_hook(self.seen.append)
        if self.how == "hook on the node":
            other.grad_fn.register_prehook(lambda grads: self.seen.append(grads[0]))
        return self.layer(x), other


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.seen: list[Tensor | None] = []
        self.two, self.out = TwoOutputs(how, self.seen), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(x)[0])


class FunctionOnInput(nn.Module):
    """The unused result depends on what came before the module as well."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.two = nn.Parameter(drawn(D, D)), TwoOutputs("plain", [])
        self.out = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x + Squares.apply(self.before).detach()
        return self.out(self.two(y)[0])


def made(how: str) -> Model:
    torch.manual_seed(0)
    return Model(how).double()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("how", ["plain", "function"])
def test_gradients_stay_none(how: str, verify: bool) -> None:
    model, x = made(how), drawn(N, D)
    assert_training_untouched(model, lambda: squares(model(x)), N, verify=verify)


def test_weight_decay_moves_what_it_moves_without_ghost() -> None:
    x, trained = drawn(N, D), []
    for ghost in (False, True):
        model = made("function")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        engine = GradientHolder(model, verify=False)
        for _ in range(3):
            optimizer.zero_grad()
            if ghost:
                with engine, engine.batch(range(N)):
                    squares(model(x)).sum().backward()
            else:
                squares(model(x)).sum().backward()
            optimizer.step()
        trained.append(dict(model.named_parameters()))
    for name, parameter in trained[0].items():
        assert torch.equal(parameter, trained[1][name]), name


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("how", ["hook", "hook on the node"])
def test_hooks_are_not_called(how: str, verify: bool) -> None:
    model, x = made(how), drawn(N, D)
    squares(model(x)).sum().backward()
    assert model.seen == []
    engine = GradientHolder(model, verify=verify)
    with engine, engine.batch(range(N)):
        squares(model(x)).sum().backward()
    assert model.seen == []


@pytest.mark.parametrize("verify", [True, False])
def test_what_came_before_the_module_stays_none(verify: bool) -> None:
    torch.manual_seed(0)
    model, x = FunctionOnInput().double(), drawn(N, D)
    assert_training_untouched(model, lambda: squares(model(x)), N, verify=verify, layers="out.*")
