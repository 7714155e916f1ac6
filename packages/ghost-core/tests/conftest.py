"""Fixtures for all tests: a registry, an engine that keeps everything, and a comparison."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import SamplerRegistry
from ghost_core.testing import (
    GradientHolder,
    Held,
    assert_within,
    per_sample_gradients,
    plain_registry,
)


class Model(nn.Module):
    """Two layers; raises between them on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.broken:
            raise KeyError("broken")
        return self.second(x)


@pytest.fixture
def model() -> nn.Module:
    return Model().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` formats stack traces, too


@pytest.fixture
def registry() -> SamplerRegistry:
    return plain_registry()


@pytest.fixture
def hold(registry: SamplerRegistry) -> Callable[..., GradientHolder]:
    """Make an engine that knows the plain samplers."""

    def make(model: nn.Module, **options: object) -> GradientHolder:
        return GradientHolder(model, registry=registry, **options)

    return make


@pytest.fixture
def assert_held() -> Callable[..., None]:
    """Compare what an engine held with gradients by name, relative to each sample's norm."""

    def check(held: Held, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
        got = held.materialize()
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.numel() == 0 or gradient.any(), f"the reference of {name} is zero"
            flat = gradient.double().reshape(len(gradient), gradient.shape[1:].numel())
            scale = flat.norm(dim=1).reshape(-1, *[1] * (gradient.dim() - 1))
            assert_within(got[name], gradient, scale, tolerance, name)

    return check


@pytest.fixture
def assert_exact(
    hold: Callable[..., GradientHolder], assert_held: Callable[..., None]
) -> Callable[..., None]:
    """Compare one forward and backward pass in a batch with autograd, sample by sample."""

    def check(
        model: nn.Module,
        losses: Callable[[], Tensor],
        tolerance: float = 1e-9,
        **options: object,
    ) -> None:
        engine = hold(model, **options)
        torch.manual_seed(1)
        expected = per_sample_gradients(
            model, losses(), [parameter.name for parameter in engine.parameters]
        )
        n = len(next(iter(expected.values())))
        torch.manual_seed(1)
        with engine, engine.batch(range(n)) as batch:
            losses().sum().backward()
        assert_held(batch.result, expected, tolerance)

    return check
