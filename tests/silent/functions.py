"""A function of its own that a parameter goes into, where no mode sees what becomes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Product(torch.autograd.Function):
    """A linear map with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)
