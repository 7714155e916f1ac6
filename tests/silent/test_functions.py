"""Parameters used inside custom functions and operators: exact or refused, frozen too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.silent.compare import WAYS, drawn, exact_or_refused, holds, squares
from tests.silent.functions import Product
from torch import Tensor, nn

from ghost_core import WrongSplitError
from ghost_core.testing import per_sample_gradients

N, D, V = 4, 8, 6


class FusedLoss(torch.autograd.Function):
    """A head and its loss in one node, which computes gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = hidden @ weight.T
        wrong = logits.softmax(1) - nn.functional.one_hot(targets, len(weight))
        ctx.save_for_backward(wrong @ weight, wrong, hidden)
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, wrong, hidden = ctx.saved_tensors
        return to_hidden * grad[:, None], (wrong * grad[:, None]).T @ hidden, None


class Separate(Product):
    """A linear map with a context that is set up afterwards."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


@torch.library.custom_op("ghost_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


product.register_autograd(Product.backward, setup_context=_keep)


class Model(nn.Module):
    """Uses the head's weight in its own way, never calling the head."""

    def __init__(self, how: str, tied: bool) -> None:
        super().__init__()
        self.emb, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head, self.how = nn.Linear(D, V, bias=False), how
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden, weight = self.body(self.emb(ids)).tanh(), self.head.weight
        if self.how == "fused loss":
            return FusedLoss.apply(hidden, weight, targets)
        if self.how == "function":
            return squares(Product.apply(hidden, weight))
        if self.how == "separate":
            return squares(Separate.apply(hidden, weight))
        if self.how == "monitored":
            with torch.no_grad():
                self.average = self.body.weight.lerp(weight.mean(), 0.1).norm()
            return squares(self.head(hidden))
        if self.how == "view":
            return squares(Product.apply(hidden, weight.view(V, D)[1:]))
        return squares(product(hidden, weight))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["fused loss", "function", "separate", "custom operator"])
def test_weight_of_a_module_that_is_not_called(how: str, tied: bool, way: str) -> None:
    torch.manual_seed(0)
    model = Model(how, tied).double()
    ids, targets = torch.tensor([1, 2, 3, 1]), torch.tensor([0, 5, 2, 1])
    # Where the weight is frozen, a function makes no gradient of it.
    followed = "exact" if how == "custom operator" or way == "attached" else "refused"
    assert exact_or_refused(model, lambda: model(ids, targets), way) == followed


@pytest.mark.parametrize("way", WAYS)
def test_what_is_computed_without_gradients_is_no_use(way: str) -> None:
    torch.manual_seed(0)
    model = Model("monitored", tied=False).double()
    ids, targets = torch.tensor([1, 2, 3, 1]), torch.tensor([0, 5, 2, 1])
    assert exact_or_refused(model, lambda: model(ids, targets), way) == "exact"


def test_refusal_names_the_parameter_reason_and_remedy() -> None:
    model = Model("fused loss", tied=False).double()
    ids, targets = torch.tensor([1, 2, 3, 1]), torch.tensor([0, 5, 2, 1])
    expected = per_sample_gradients(model, model(ids, targets))
    with pytest.raises(WrongSplitError, match=r"head\.weight") as refused:
        holds(model, lambda: model(ids, targets), "frozen", expected)
    assert "cannot be seen" in refused.value.reason
    assert "exclude='head.weight'" in refused.value.remedy


@pytest.mark.parametrize("way", WAYS)
def test_view_of_a_weight_is_seen(way: str) -> None:
    torch.manual_seed(0)
    model = Model("view", tied=False).double()
    ids, targets = torch.tensor([1, 2, 3, 1]), torch.tensor([0, 5, 2, 1])
    assert exact_or_refused(model, lambda: model(ids, targets), way) == "exact"


class PatchedForward(nn.Module):
    """A layer called as a module whose own forward goes through a function: that is no misuse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight)


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_uses_its_own_weight_in_a_function_is_exact(way: str) -> None:
    model, x = nn.Sequential(PatchedForward(), nn.Tanh(), nn.Linear(D, 2)).double(), drawn(N, D)
    assert exact_or_refused(model, lambda: squares(model(x)), way) == "exact"
