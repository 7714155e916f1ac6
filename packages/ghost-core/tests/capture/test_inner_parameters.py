"""Samplers that own parameters of modules inside, run modules, or stand in for any module."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    CaptureError,
    Engine,
    Freeze,
    Record,
    SamplerRegistry,
    UnsupportedLayerError,
)
from ghost_core.sampler import Call
from ghost_core.testing import GradientHolder, PlainLinear
from ghost_core.tracking import Claim, dotted_name

from .replays import Bent, D, N, OwnsInside, Replays, Scaled, T, assert_exact, losses_of, registry


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), Scaled(), nn.Linear(D, 2)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, T, D, dtype=torch.float64)


def test_a_sampler_owns_parameters_of_modules_inside(assert_held, model, x) -> None:
    engine = GradientHolder(model, registry=registry((Scaled, OwnsInside)), exclude="1.out.bias")
    owners = {tracked.name: list(tracked.parameters) for tracked in engine.tracking.modules}
    assert owners["1"] == ["scale", "out.weight"]
    assert "1.out" not in owners
    assert owners["1.inner"] == ["weight", "bias"]
    assert "OwnsInside" in engine.coverage()
    assert_exact(assert_held, engine, model, x)
    for name in ("1.scale", "1.out.weight"):
        alone = GradientHolder(model, layers=name, registry=registry((Scaled, OwnsInside)))
        assert_exact(assert_held, alone, model, x)


def test_a_parameter_used_outside_its_module_is_followed_without_such_a_sampler(
    model, x, assert_held
) -> None:
    engine = GradientHolder(model, registry=registry((nn.Module, Replays)), exclude="1.out.bias")
    assert_exact(assert_held, engine, model, x)


def test_engines_make_the_gradients_of_modules_inside(model, x) -> None:
    class Fused(GradientHolder):
        freeze = Freeze.CALL

        def on_gradient(self, pass_, parameter, gradient):
            super().on_gradient(pass_, parameter, gradient)
            return gradient.sum()

    losses_of(model(x)).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    engine = Fused(model, registry=registry((Scaled, OwnsInside)), exclude="1.out.bias")
    with engine, engine.batch(range(N)):
        losses_of(model(x)).sum().backward()
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    assert all(leaf.requires_grad for leaf in model.parameters())


def test_a_parameter_may_be_used_inside_of_what_its_module_calls(assert_held, x) -> None:
    class Added(nn.Linear):
        """Adds what it is given."""

        def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
            return super().forward(x) + (1 if given is None else given * 2)

    class Lends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lent, self.inner = nn.Parameter(torch.randn(D)), Added(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.lent)

    model = nn.Sequential(Lends()).double()
    known = registry((Lends, Replays), (Added, PlainLinear))
    assert_exact(assert_held, GradientHolder(model, registry=known), model, x)


@pytest.mark.parametrize("names", ["*", "bias"])
def test_any_module_falls_to_the_sampler_of_a_base_class(assert_held, x, names) -> None:
    model = nn.Sequential(Bent(D, D), nn.Linear(D, D)).double()
    engine = GradientHolder(
        model, layers=f"0.{names}" if names != "*" else "*", registry=registry((nn.Module, Replays))
    )
    assert type(engine.tracking.modules[0].sampler) is Replays
    assert_exact(assert_held, engine, model, x)


def test_generic_samplers_can_be_done_without() -> None:
    known = registry((nn.Module, Replays))
    with pytest.raises(UnsupportedLayerError, match=r"Bent replaces forward of Linear"):
        GradientHolder(nn.Sequential(Bent(D, D)), registry=known, generic=False)
    with pytest.raises(UnsupportedLayerError, match=r"no sampler is registered for .*Bilinear"):
        GradientHolder(nn.Bilinear(D, D, D), registry=known, generic=False)


def test_a_refusal_is_not_overridden_by_a_generic_sampler() -> None:
    class Refuses(PlainLinear):
        def refuse(self, module: nn.Module) -> str:
            return "it must not be"

    known = SamplerRegistry(
        Claim(dotted_name(kind), sampler, "test")
        for kind, sampler in ((nn.Linear, Refuses), (nn.Module, Replays))
    )
    with pytest.raises(UnsupportedLayerError, match=r"it must not be"):
        GradientHolder(nn.Sequential(nn.Linear(D, D)), registry=known)


def test_what_a_sampler_runs_is_not_captured(assert_held, x) -> None:
    """The replayed module calls a tracked one, which must see one call only."""
    model = nn.Sequential(Scaled(), nn.Linear(D, 2)).double()
    engine = GradientHolder(model, registry=registry((nn.Module, Replays)), exclude="0.out")
    model[0].out.requires_grad_(False)
    assert_exact(assert_held, engine, model, x)
    with engine, engine.batch(range(N)) as batch:
        losses_of(model(x)).sum().backward()
    assert len(batch.result.uses["0.inner.weight"]) == 1


def test_the_hooks_come_back_after_a_sampler_failed(x) -> None:
    class Fails(Replays):
        def record(self, call: Call) -> Mapping[str, Record]:
            raise CaptureError("not this one")

    model = nn.Sequential(Bent(D, D)).double()
    engine: Engine = GradientHolder(model, registry=registry((Bent, Fails)))
    with engine:
        for _ in range(2):
            failing = pytest.raises(CaptureError, match=r"not this one")
            with failing, engine.batch(range(N)):
                model(x)
