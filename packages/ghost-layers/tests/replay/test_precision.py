from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from ghost_core.testing import GradientHolder, per_sample_gradients

from .modules import Behind, Gated, check, registry


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 3e-2),
        (torch.float32, True, 3e-2),
    ],
)
def test_lower_precision(dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    class Cast(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out: Tensor = self.module(x)
            return out

    model = Cast(Behind(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), Gated(0.5))))
    engine = check(model.to(dtype), torch.randn(5, 3, 4).to(dtype), tolerance=tolerance)
    assert len(engine.parameters) == 10


def test_random_numbers_beside_large_values_are_those_of_the_call() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter((torch.randn(8) * 0.02).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            scaled = functional.layer_norm(x, (8,)) * self.scale
            return x + functional.dropout(scaled, 0.1, self.training)

    model = nn.Sequential(Drops())
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[..., 0] *= 200
    slope = torch.linspace(-1, 1, x.numel()).reshape(x.shape).double()
    for options in ({"batch_dim": {"*": 1}}, {}):
        n, axes = (4, (0, 2)) if options else (6, (1, 2))
        engine = GradientHolder(model, registry=registry(), lift=False, **options)
        torch.manual_seed(1)
        expected = per_sample_gradients(model, (model(x).double() * slope).sum(axes))
        torch.manual_seed(1)
        with engine.frozen(), engine.batch(range(n)) as batch:
            (model(x).double() * slope).sum(axes).sum().backward()
        for name, gradient in batch.result.materialize().items():
            error = (gradient - expected[name].double()).norm() / expected[name].double().norm()
            assert error < 2e-2, f"{name} {options}"
