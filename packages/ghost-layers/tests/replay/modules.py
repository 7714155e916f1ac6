"""Modules with parameters of their own, and a comparison of what is replayed with autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import (
    SamplerRegistry,
)
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name
from ghost_layers.plugin import ghost_samplers
from ghost_layers.replay import GenericSampler


def registry() -> SamplerRegistry:
    offered = {
        kind if isinstance(kind, str) else dotted_name(kind): sampler
        for kind, sampler in ghost_samplers().items()
    }
    offered[dotted_name(nn.Module)] = GenericSampler
    return SamplerRegistry(Claim(kind, sampler, "test") for kind, sampler in offered.items())


def losses(output: Any) -> Tensor:
    values = (output if isinstance(output, Tensor) else output[0]).double()
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return (weights * (values + (1 + values**2).sqrt())).flatten(1).sum(1)


def check(
    model: nn.Module,
    *inputs: Any,
    layers: str = "*",
    frozen: bool = False,
    tolerance: float = 1e-9,
    lift: bool = False,
    **options: Any,
) -> GradientHolder:
    """Compare with autograd on a copy, also that nothing else than gradients differs afterwards."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    plain = losses(other(*inputs))
    expected = per_sample_gradients(other, plain)
    after = torch.get_rng_state()
    engine = GradientHolder(model, registry=registry(), lift=lift, layers=layers, **options)
    torch.manual_seed(1)
    with engine.frozen() if frozen else engine, engine.batch(range(len(plain))) as batch:
        output = model(*inputs)
        losses(output).sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    held = batch.result.materialize()
    for name, gradient in held.items():
        rows = expected[name].flatten(1)
        scale = rows.norm(dim=1).clamp(min=1e-6).reshape(-1, *[1] * (gradient.dim() - 1))
        assert_within(gradient, expected[name], scale, tolerance, name)
    return engine


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Behind(nn.Module):
    """Puts a linear layer in front of a module, so that its inputs have gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.module = module

    def forward(self, x: Tensor, *inputs: Any) -> Any:
        return self.module(self.linear(x), *inputs)


class Scaled(nn.Module):
    """Holds a bare parameter; what it does is given, or written by a subclass."""

    def __init__(self, forward: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.scale * x if self.function is None else self.function(self, x)


class Gated(nn.Module):
    """A residual block behind a layer scale."""

    def __init__(self, gate: float, dropout: float = 0.5) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((4,), gate))
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.dropout(functional.gelu(self.linear(self.norm(x))))


class Experts(nn.Module):
    """Routes by value, which cannot be vectorised."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4))
        self.unused = nn.Parameter(torch.randn(2))
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        share, chosen = (rows @ self.gate.T).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for expert in range(3):
            (index,) = (chosen == expert).nonzero(as_tuple=True)
            index = index[: self.capacity]
            made = (rows[index] @ self.weight[expert]) * share[index, None]
            out = out.index_put((index,), made)
        return out.view_as(x)


class Head(nn.Module):
    """Holds a bias that is that of a layer inside, as BERT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))
        self.decoder.bias = self.bias
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x) * self.scale


def unordered_noise(x: Tensor) -> Tensor:
    """Draw numbers in another order than sample by sample."""
    return torch.rand(x.shape[1], len(x), *x.shape[2:], dtype=x.dtype).transpose(0, 1)


class Zero(Scaled):
    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(function)
        nn.init.zeros_(self.scale)
