"""A model, a loss that couples tokens, and samplers that are wrong on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import Dense, PerSampleGradient, SamplerRegistry
from ghost_core.compare import Comparison, compare
from ghost_core.plugins import select
from ghost_core.testing import PlainEmbedding, PlainLayerNorm, PlainLinear, plain_registry
from ghost_core.tracking import Claim, dotted_name

N, T, D = 6, 5, 4

Change = Callable[[str, PerSampleGradient], PerSampleGradient]


class _Layers(nn.Module):
    """Maps `[N, T, D]` to itself: a linear layer, something between, and another one."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.between = between or nn.Tanh()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.between(self.first(inputs)))


def _own(outputs: Tensor) -> Tensor:
    each = outputs.sin().flatten(1).sum(1)
    return each + each.square()


def _check(model: nn.Module, losses: Callable[[], Tensor], **options: object) -> Comparison:
    known = set(inspect.signature(select).parameters)
    chosen = {name: options.pop(name) for name in known & options.keys()}
    selection = select(**{"registry": plain_registry(), **chosen})
    return compare(model, losses, selection, **options)


def _faulty(change: Change) -> SamplerRegistry:
    class Faulty(PlainLinear):
        def gradients(self, call, records, grads):
            made = dict(super().gradients(call, records, grads))
            return {name: change(name, gradient) for name, gradient in made.items()}

    layers = {nn.Linear: Faulty, nn.Embedding: PlainEmbedding, nn.LayerNorm: PlainLayerNorm}
    return SamplerRegistry(
        Claim(dotted_name(layer), sampler, "tests") for layer, sampler in layers.items()
    )


@pytest.fixture
def layers() -> type[_Layers]:
    """The class of the models."""
    return _Layers


@pytest.fixture
def model() -> nn.Module:
    return _Layers().double()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(N, T, D, dtype=torch.float64)


@pytest.fixture
def own() -> Callable[[Tensor], Tensor]:
    """Return a loss per sample, `[N]`, in which tokens meet."""
    return _own


@pytest.fixture
def check() -> Callable[..., Comparison]:
    """Compare a model's gradients with autograd's, with the plain samplers."""
    return _check


@pytest.fixture
def faulty() -> Callable[[Change], SamplerRegistry]:
    """Make a registry whose sampler of linear layers changes the gradients, given their names."""
    return _faulty


@pytest.fixture
def doubled() -> SamplerRegistry:
    """A registry whose sampler of linear layers makes gradients that are twice as large."""
    return _faulty(lambda name, gradient: Dense(2 * gradient.materialize()[:, None]))
