from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from tests.fresh import Fresh
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ghost_core import GradientSampler, SamplerRegistry, UnsupportedLayerError
from ghost_core.testing import GradientHolder
from ghost_layers.plugin import ghost_samplers


class Renamed(nn.Linear):
    """A subclass that computes what its base does."""


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class OwnKernel(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.norm(), bias)


class OwnStatistics(nn.InstanceNorm1d):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return 2 * super()._apply_instance_norm(input)


def with_own_forward_of_instance() -> nn.Module:
    module = nn.Linear(4, 3)
    module.forward = MethodType(lambda self, input: 2 * input, module)  # type: ignore[method-assign]
    return module


def with_old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 3))


def test_samplers_are_complete() -> None:
    table = ghost_samplers()
    assert all(not sampler.__abstractmethods__ for sampler in table.values())
    assert all(issubclass(sampler, GradientSampler) for sampler in table.values())
    assert all(isinstance(kind, str) or issubclass(kind, nn.Module) for kind in table)


def test_transformers_is_not_imported(fresh: Fresh) -> None:
    done = fresh("import sys, ghost_layers.plugin; sys.exit('transformers' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_subclass_that_changes_nothing_is_handled(registry: SamplerRegistry) -> None:
    model = nn.Sequential(Renamed(4, 3))
    with GradientHolder(model, registry=registry) as engine, engine.batch(range(2)) as batch:
        model(torch.randn(2, 4)).sum().backward()
    assert batch.result.materialize()["0.weight"].any()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnForward(4, 3), "OwnForward replaces forward of Linear"),
        (lambda: OwnKernel(4, 3, 2), "OwnKernel replaces _conv_forward of Conv2d"),
        (
            lambda: OwnStatistics(4, affine=True),
            "OwnStatistics replaces _apply_instance_norm of InstanceNorm1d",
        ),
        (with_own_forward_of_instance, "Linear replaces forward of Linear"),
        (with_old_weight_norm, "it owns weight_g, weight_v, which Linear does not"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
            r"it owns parametrizations\.weight\.original0, .*, which Linear does not",
        ),
        (lambda: nn.Bilinear(4, 2, 3), r"no sampler is registered for .*\.Bilinear"),
    ],
)
def test_layer_that_computes_something_else_has_no_formula(
    registry: SamplerRegistry, make: Any, reason: str
) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        GradientHolder(nn.Sequential(make()), registry=registry, generic=False)
