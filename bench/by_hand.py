"""The products that scores need and nothing else, in plain hooks: no engine can cost less.

They check nothing, know linear layers alone, and take one call of each on all samples for granted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.case import Way
from bench.steps import Loss


def dots(model: nn.Module, loss: Loss) -> Way:
    """Return a step with a dot product for each sample and weight of a linear layer."""
    model = copy.deepcopy(model)
    found: list[Tensor] = []
    for module, weight in linear_layers(model):
        module.register_forward_hook(Contraction(torch.randn_like(weight), found))
    return _stepping(model, loss, found)


def built(model: nn.Module, loss: Loss, *, norms: bool) -> Way:
    """Return a step that forms each weight's gradient sample by sample, for dots as it goes.

    Args:
        model: The model; it is copied.
        loss: The loss of a batch.
        norms: Whether squared norms are taken as well.
    """
    model = copy.deepcopy(model)
    found: list[Tensor] = []
    for module, weight in linear_layers(model):
        module.forward = _forward(module, weight, found, norms)
    return _stepping(model, loss, found)


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Return the linear layers, GPT-2's too, each with its weight as `[p, d]`."""
    from transformers.pytorch_utils import Conv1D  # takes seconds

    return [
        (module, module.weight if isinstance(module, nn.Linear) else module.weight.T)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]


class Contraction:
    """A forward hook that multiplies a layer's inputs and gradients with a direction.

    Args:
        direction: `[p, d]`.
        found: Where dots go, `[N]` for each layer.
    """

    def __init__(self, direction: Tensor, found: list[Tensor]) -> None:
        self.direction, self.found = direction.contiguous(), found

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        """Wait for the gradient."""
        inputs = args[0].detach()
        output.register_hook(lambda grad: self.arrived(inputs, grad))

    def arrived(self, inputs: Tensor, grad: Tensor) -> None:
        """Contract on the narrower side."""
        p, d = self.direction.shape
        with torch.no_grad():
            if d < p:
                products = (grad @ self.direction).mul_(inputs)
            else:
                products = linear(inputs, self.direction).mul_(grad)
            self.found.append(products.flatten(1).sum(1))


class Built(torch.autograd.Function):
    """A linear layer whose backward pass makes the weight's gradient sample by sample."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        direction: Tensor,
        take: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        """Return `x Wᵀ + b`, `[N, T, p]`."""
        ctx.save_for_backward(x, weight, direction)
        ctx.take, ctx.biased = take, bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Form each sample's part while it is in the cache, and add it up."""
        x, weight, direction = ctx.saved_tensors
        total, part = (torch.empty_like(direction) for _ in range(2))
        for at, (inputs, grads) in enumerate(zip(x, grad, strict=True)):
            torch.mm(grads.T, inputs, out=part if at else total)
            ctx.take((part if at else total).view(-1), direction.view(-1))
            if at:
                total += part
        bias = grad.sum((0, 1)) if ctx.biased else None
        return grad @ weight, total, bias, None, None


def _forward(
    module: nn.Module, weight: Tensor, found: list[Tensor], norms: bool
) -> Callable[[Tensor], Tensor]:
    direction, bias = torch.randn(weight.shape, device=weight.device), module.bias

    def take(part: Tensor, along: Tensor) -> None:
        found.append(part.dot(along))
        if norms:
            found.append(part.dot(part))

    def forward(x: Tensor) -> Tensor:
        given = module.weight if isinstance(module, nn.Linear) else module.weight.T
        made: Tensor = Built.apply(x, given, bias, direction, take)  # type: ignore[no-untyped-call]
        return made

    return forward


def _stepping(model: nn.Module, loss: Loss, found: list[Tensor]) -> Way:
    def run() -> None:
        found.clear()
        loss(model).backward()

    return Way(run, model.zero_grad)
