from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import (
    UnsupportedLayerError,
    WrongSplitError,
)
from ghost_core.testing import GradientHolder

from .modules import Behind, Gated, Head, Scaled, Zero, check, doubles, losses, registry


class Caching(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.cached = [self.scale]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cached[0]


class Using(Head):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.decoder.weight.detach(), self.decoder.bias) * self.scale


class Normalizing(Scaled):
    def __init__(self, gate: float) -> None:
        super().__init__()
        nn.init.constant_(self.scale, gate)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(x)


class Stateful(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        made = x * self.scale
        if hasattr(self, "last"):
            made = made + self.last.detach()
        self.last = made
        return made


GENERATOR = torch.Generator().manual_seed(0)


def foreign_noise(module: Scaled, x: Tensor) -> Tensor:
    return x + module.scale * torch.rand(x.shape, generator=GENERATOR, dtype=x.dtype)


def keep(module: Any, x: Tensor) -> Tensor:
    module.kept += 1
    return x * module.scale


def keeping() -> Scaled:
    module: Any = Scaled(keep)
    module.kept = torch.zeros(4)
    kept: Scaled = module
    return kept


class Large(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("large", torch.zeros(2**17))

    def forward(self, x: Tensor) -> Tensor:
        self.large += 1
        return x * self.scale * self.large[0]


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "writes into its inputs": lambda: Scaled(lambda module, x: x.mul_(module.scale)),
    "writes into its inputs, its parameters or tensors that it keeps": keeping,
    "its code keeps scale in another place than its parameters": Caching,
    "it uses decoder.bias, a parameter that it owns under another name": Using,
    "a sample's output depends on other samples": lambda: Normalizing(0.0),
    "depends on other samples, as where something normalises": lambda: Normalizing(1e-9),
    "something else: it draws random numbers": lambda: Scaled(foreign_noise),
    "something else each time that it runs": lambda: Zero(foreign_noise),
    "writes into its buffer large, which is too large": Large,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_run_again_is_refused(reason: str) -> None:
    model = Behind(REFUSED[reason]()).double()
    engine = GradientHolder(
        model, registry=registry(), lift=False, layers="linear,*scale,*module.*"
    )
    pattern = rf"(?s)split by sample: module .*Reason: .*{reason}.*Remedy: .*exclude="
    with engine, pytest.raises(WrongSplitError, match=pattern), engine.batch(range(3)):
        model(doubles(3, 4))


def test_state_with_a_graph_is_refused() -> None:
    model = Behind(Stateful()).double()
    model(doubles(3, 4))
    engine = GradientHolder(model, registry=registry(), lift=False)
    with (
        engine,
        pytest.raises(WrongSplitError, match=r"running it again failed with AttributeError"),
        engine.batch(range(3)),
    ):
        model(doubles(3, 4))


def test_nested_tensors_are_refused() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, other: object) -> Tensor:
            return x * self.scale

    lengths = torch.nn.utils.rnn.pack_padded_sequence(torch.ones(2, 2, 1), torch.tensor([2, 1]))
    values = {
        r"nested or sparse": torch.eye(3).to_sparse(),
        r"PackedSequence": lengths,
    }
    model = Behind(Takes()).double()
    for reason, value in values.items():
        # Parameters are followed instead where a packed sequence comes in, unless none may be.
        engine = GradientHolder(model, registry=registry(), lift=False)
        with engine, pytest.raises(WrongSplitError, match=reason), engine.batch(range(3)):
            model(doubles(3, 4), value)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(4, 4))


def hooked() -> nn.Module:
    gated = Gated(0.1)
    gated.linear.register_forward_hook(lambda module, args, output: 2 * output)
    return gated


class ComplexScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.complex64))


UNCOPIED: dict[str, Callable[[], nn.Module]] = {
    r"WeightNorm.*use torch.nn.utils.parametrizations.weight_norm instead": old_weight_norm,
    r"parametrizations.spectral_norm": lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    r"linear \(torch.nn.modules.linear.Linear\) has a hook, .*hooked.*exclude": hooked,
    r"scale is complex": ComplexScale,
}


@pytest.mark.parametrize("reason", UNCOPIED)
def test_modules_that_cannot_be_copied_are_refused(reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        GradientHolder(
            nn.Sequential(UNCOPIED[reason]()), registry=registry(), lift=False, layers="0.*"
        )


def test_hook_that_comes_later_is_refused() -> None:
    model = Behind(Gated(0.1)).double()
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine:
        model.module.norm.register_forward_hook(lambda module, args, output: output)
        with pytest.raises(WrongSplitError, match=r"has a hook"), engine.batch(range(3)):
            model(doubles(3, 4))


def test_loss_of_a_scalar_output_is_refused() -> None:
    def with_penalty(module: Scaled, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * module.scale, module.scale.square().sum()

    model = Behind(Scaled(with_penalty)).double()
    check(model, doubles(3, 4))
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine, engine.batch(range(3)):
        output, penalty = model(doubles(3, 4))
        with pytest.raises(WrongSplitError, match=r"scalar"):
            (output.sum() + penalty).backward()
        losses(model(doubles(3, 4))).sum().backward()
