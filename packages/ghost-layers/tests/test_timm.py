"""timm's layers, rebuilt under its names: closed forms where they hold, replays where they do not.

Models of them are compared with autograd in tests/foreign.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import SamplerRegistry, WrongSplitError
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.tracking import Found
from ghost_layers.replay import GenericSampler


def named(kind: type[nn.Module], module: str, name: str) -> Any:
    """Return a class with the dotted name of one of timm's."""
    return type(name, (kind,), {"__module__": f"timm.layers.{module}"})


class BatchNormAct(nn.BatchNorm2d):
    def __init__(self, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(4)
        self.act, self.drop = copy.deepcopy(act), drop or nn.Identity()
        self.running_mean, self.running_var = torch.randn(4), torch.rand(4) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return self.act(
            self.drop(functional.batch_norm(x, *statistics, self.training, 0, self.eps))
        )


class Standardized(nn.Conv2d):
    def __init__(self, **options: Any) -> None:
        super().__init__(4, 6, 3, **options)
        self.eps = 1e-3  # which shows

    def kernel(self, gain: Tensor | None) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        made = functional.batch_norm(rows, None, None, gain, training=True, eps=self.eps)
        return made.reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(None), self.bias)


class ScaledStandardized(Standardized):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale, self.gain = 0.3, nn.Parameter(torch.randn(6, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel((self.gain * self.scale).view(-1))
        return functional.conv2d(
            x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Scale(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.gamma, self.inplace = nn.Parameter(torch.randn(4)), inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Scale2d(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


class Exponential(Scale2d):
    """Has the gradient of `Scale2d` where gamma is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.exp().view(1, -1, 1, 1)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        shape, weight, bias = self.normalized_shape, self.weight, self.bias
        return functional.layer_norm(rows, shape, weight, bias, self.eps).permute(0, 3, 1, 2)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def batch_norm(act: nn.Module) -> Callable[[], nn.Module]:
    return lambda: named(BatchNormAct, "norm_act", "BatchNormAct2d")(act)


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "ReLU": batch_norm(nn.ReLU(inplace=True)),
    "SiLU": batch_norm(nn.SiLU(inplace=True)),
    "identity": batch_norm(nn.Identity()),
    "LayerScale2d": named(Scale2d, "layer_scale", "LayerScale2d"),
    "LayerScale": named(Scale, "layer_scale", "LayerScale"),
    "Linear": lambda: named(Linear, "linear", "Linear")(4, 3),
    "LayerNorm2d": lambda: named(LayerNorm2d, "norm", "LayerNorm2d")(4),
    "LayerNorm": lambda: named(LayerNorm, "norm", "LayerNorm")(4),
    "GroupNorm1": lambda: named(GroupNorm, "norm", "GroupNorm1")(1, 4),
    "StdConv2d": lambda: named(Standardized, "std_conv", "StdConv2d")(bias=False, dilation=(2, 1)),
    "ScaledStdConv2d": lambda: named(ScaledStandardized, "std_conv", "ScaledStdConv2d")(
        padding=1, groups=2, stride=2
    ),
}

UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "another formula": named(Exponential, "layer_scale", "LayerScale2d"),
    "parameters in the activation": batch_norm(nn.PReLU()),
    "random numbers": batch_norm(nn.RReLU()),
    "dropout": lambda: named(BatchNormAct, "norm_act", "BatchNormAct2d")(nn.ReLU(), nn.Dropout()),
    "in place": lambda: named(Scale, "layer_scale", "LayerScale")(inplace=True),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Conv2d(3, 4, 1), layer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(self.before(x))
        return made


def check(layer: nn.Module, registry: SamplerRegistry, frozen: bool, **options: Any) -> None:
    model = Model(layer).double().eval()
    x = torch.randn(3, 3, 5, 4, dtype=torch.float64)

    def losses() -> Tensor:
        return model(x).flatten(1).sin().sum(1)

    expected = per_sample_gradients(model, losses())
    engine = GradientHolder(model, registry=registry, **options)
    with engine.frozen() if frozen else engine, engine.batch(range(3)) as batch:
        losses().sum().backward()
    held = batch.result.materialize()
    assert held
    for name, gradient in held.items():
        assert expected[name].norm() > 0
        assert_within(gradient, expected[name], expected[name].norm(), what=name)


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("frozen", [False, True])
def test_known_layers_have_closed_forms(kind: str, frozen: bool, registry: SamplerRegistry) -> None:
    layer = KNOWN[kind]()
    if kind in ("LayerNorm", "LayerScale", "Linear"):
        layer = nn.Sequential(nn.Flatten(2), Transposed(), layer)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    check(layer, registry, frozen, generic=False)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


@pytest.mark.parametrize("asked", ["gain", "weight", "bias"])
def test_some_of_the_parameters(asked: str, registry: SamplerRegistry) -> None:
    check(KNOWN["ScaledStdConv2d"](), registry, False, layers=f"layer.{asked}", generic=False)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_formulas_are_left_to_replays(kind: str, registry: SamplerRegistry) -> None:
    found = registry.find(UNKNOWN[kind]().double())
    assert isinstance(found, Found)
    assert isinstance(found.sampler, GenericSampler)


def test_a_formula_that_is_another_is_run_again(registry: SamplerRegistry) -> None:
    layer = UNKNOWN["another formula"]()
    nn.init.zeros_(layer.gamma)  # where the first derivatives are the same
    check(layer, registry, False)


def test_training_mode_is_refused_as_for_any_batch_norm(registry: SamplerRegistry) -> None:
    model = Model(KNOWN["ReLU"]()).train()
    engine = GradientHolder(model, registry=registry)
    with (
        engine,
        pytest.raises(WrongSplitError, match=r"layer normalises over the batch"),
        engine.batch(range(2)),
    ):
        model(torch.randn(2, 3, 4, 4))


def test_hooks_inside_that_come_later_are_refused(registry: SamplerRegistry) -> None:
    model = Model(KNOWN["ReLU"]()).eval()
    engine = GradientHolder(model, registry=registry)
    with engine:
        model.layer.act.register_forward_hook(lambda *_: None)
        with pytest.raises(WrongSplitError, match=r"act .*ReLU.* has a hook"), engine.batch([0, 1]):
            model(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype, registry: SamplerRegistry) -> None:
    model = Model(KNOWN["SiLU"]()).eval()
    x = torch.randn(3, 3, 5, 4)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return model(x).float().flatten(1).sin().sum(1)

    expected = per_sample_gradients(model, losses())
    engine = GradientHolder(model, registry=registry, generic=False)
    with engine, engine.batch(range(3)) as batch:
        losses().sum().backward()
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    for name, gradient in batch.result.materialize().items():
        assert_within(gradient, expected[name], expected[name].norm(), tolerance, name)
