"""Samplers that own parameters of modules inside, run modules, or stand in for any module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    CaptureError,
    Dense,
    Engine,
    Freeze,
    GradientSampler,
    PerSampleGradient,
    Record,
    SamplerRegistry,
    UnbalancedError,
    UnsupportedLayerError,
    WrongSplitError,
)
from ghost_core.sampler import Call, PastCall
from ghost_core.testing import GradientHolder, PlainLinear, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name

N, T, D = 4, 3, 5


@dataclass(frozen=True)
class Inputs(Record):
    x: Tensor


class Replays(GradientSampler):
    """Runs a module again, sample by sample, on its only input."""

    parameters = None
    methods = ()
    generic = True

    def record(self, call: Call) -> Mapping[str, Record]:
        call.static = call.module
        return dict.fromkeys(call.shapes, Inputs(call.args[0]))

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        module, names = call.static, list(call.shapes)
        record = next(iter(records.values()))
        rows: list[tuple[Tensor, ...]] = []
        for x, grad in zip(record.x, grads[0], strict=True):
            parameters = {
                name: module.get_parameter(name).detach().requires_grad_() for name in names
            }
            with torch.enable_grad():
                output = torch.func.functional_call(module, parameters, (x.unsqueeze(0),))
                first = output[0] if isinstance(output, tuple) else output
            rows.append(torch.autograd.grad(first, list(parameters.values()), grad.unsqueeze(0)))
        columns = zip(*rows, strict=True)
        return {
            name: Dense(torch.stack(column).unsqueeze(1))
            for name, column in zip(names, columns, strict=True)
        }


class Scaled(nn.Module):
    """Owns a bare parameter, and uses a Linear's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D) + 0.5)
        self.out, self.inner = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(x).tanh(), self.out.weight) * self.scale


class OwnsInside(Replays):
    parameters = ("scale", "out.weight")
    generic = False


class Bent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def registry(*samplers: tuple[type[nn.Module], type[GradientSampler]]) -> SamplerRegistry:
    known = [(nn.Linear, PlainLinear), *samplers]
    return SamplerRegistry(Claim(dotted_name(kind), sampler, "test") for kind, sampler in known)


def losses_of(output: Tensor) -> Tensor:
    return output.flatten(1).sin().sum(1)


def assert_exact(assert_held, engine: GradientHolder, model: nn.Module, x: Tensor) -> None:
    names = [parameter.name for parameter in engine.parameters]
    expected = per_sample_gradients(model, losses_of(model(x)), names)
    with engine, engine.batch(range(len(x))) as batch:
        losses_of(model(x)).sum().backward()
    assert batch.verified
    assert_held(batch.result, expected)


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


def test_a_parameter_used_outside_its_module_is_refused_without_such_a_sampler(model, x) -> None:
    engine = GradientHolder(model, registry=registry((nn.Module, Replays)), exclude="1.out.bias")
    outside = pytest.raises(WrongSplitError, match=r"1\.out\.weight: aten")
    with engine, outside, engine.batch(range(N)):
        model(x)


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


class Turned(nn.Module):
    """Returns states `[T, N, D]` and a summary `[N, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = x.cumsum(0) @ self.weight.mT
        return states, states[-1]


class TurnedSampler(GradientSampler):
    """Knows where the layer has its samples, and what it looked like before the call."""

    parameters = ("weight",)

    def batch_dims(self, module: nn.Module, outputs: int) -> tuple[int, ...]:
        assert outputs == 2
        return (1, 0)

    def prepare(self, module: nn.Module) -> object:
        return module.weight._version

    def record(self, call: Call) -> Mapping[str, Record]:
        assert call.before == call.module.weight._version
        assert [output.shape[0] for output in call.outputs] == [N, N]
        assert call.args[0].shape == (T, N, D)  # as the layer got it
        return {"weight": Inputs(call.args[0].transpose(0, 1))}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        states, last = grads
        assert not hasattr(call, "before")
        total = torch.zeros_like(records["weight"].x) if states is None else states.clone()
        if last is not None:
            total[:, -1] += last
        terms = torch.einsum("ntp,ntd->ntpd", total, records["weight"].x.cumsum(1))
        return {"weight": Dense(terms)}


@pytest.mark.parametrize("used", ["states", "last", "both"])
@pytest.mark.parametrize("options", [{}, {"batch_dim": {"": 1}}, {"batch_dim": {"*": 1}}])
def test_a_sampler_knows_the_axes_of_its_outputs(assert_held, used, options) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Turned()
            self.axis = 1 if options else 0

        def forward(self, x: Tensor) -> Tensor:
            states, last = self.inner(x if self.axis else x.transpose(0, 1))
            total = torch.zeros_like(states)
            total = total + states if used != "last" else total
            total = total + last if used != "states" else total
            return total if self.axis else total.transpose(0, 1)

    model = Root().double()
    x = torch.randn(N, T, D, dtype=torch.float64)
    x = x.transpose(0, 1) if options else x
    engine = GradientHolder(model, registry=registry((Turned, TurnedSampler)), **options)

    def losses() -> Tensor:
        output = model(x)
        return losses_of(output.transpose(0, 1) if options else output)

    expected = per_sample_gradients(model, losses())
    with engine, engine.batch(range(N)) as batch:
        losses().sum().backward()
    assert_held(batch.result, expected)


class WithPenalty(nn.Linear):
    """Returns a scalar beside its rows."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = super().forward(x)
        return output, output.square().mean()


def test_a_scalar_output_is_refused_once_a_gradient_arrives(assert_held, x) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = WithPenalty(D, D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x)

    model = Root().double()
    known = registry((nn.Module, Replays))
    engine = GradientHolder(model, registry=known, verify=False)
    expected = per_sample_gradients(model, losses_of(model(x)[0]))
    with engine, engine.batch(range(N)) as batch:
        losses_of(model(x)[0]).sum().backward()
    assert_held(batch.result, expected)
    scalar = pytest.raises(WrongSplitError, match=r"depends on a scalar that layer")
    with engine, scalar, engine.batch(range(N)):
        output, penalty = model(x)
        (losses_of(output).sum() + penalty).backward()

    class Inside(Root):
        def forward(self, x: Tensor) -> Tensor:
            output, penalty = self.layer(x)
            return output * penalty

    engine = GradientHolder(model := Inside().double(), registry=known)
    found = pytest.raises(WrongSplitError, match=r"scalar that a module computes from all samples")
    with engine, found, engine.batch(range(N)):
        model(x)


@pytest.mark.parametrize("n", [1, N])
def test_a_part_of_a_parameter_is_returned(assert_held, n) -> None:
    class Places(nn.Module):
        """A table of positions, which its owner returns as it is."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 2 * T, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.table[:, : x.shape[1]]

    class PlacesSampler(GradientSampler):
        parameters = ("table",)

        def record(self, call: Call) -> Mapping[str, Record]:
            return {}

        def gradients(
            self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
        ) -> Mapping[str, PerSampleGradient]:
            rows = torch.nn.functional.pad(grads[0], (0, 0, 0, T))
            return {"table": Dense(rows[:, None, None])}

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.head = Places(), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.places(x)).tanh())

    model, x = Root().double(), torch.randn(n, T, D, dtype=torch.float64)
    engine = GradientHolder(model, registry=registry((Places, PlacesSampler)))
    assert_exact(assert_held, engine, model, x)


@pytest.mark.parametrize("where", ["attribute", "argument"])
def test_a_way_past_the_outputs_is_refused(x, where) -> None:
    class Leaks(nn.Linear):
        def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
            output = super().forward(x)
            if where == "attribute":
                self.left = output.tanh()
            elif cache is not None:
                cache["left"] = output.tanh()
            return output

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cache = Leaks(D, D), {}

        def forward(self, x: Tensor) -> Tensor:
            output = self.layer(x, self.cache)
            return output + (self.layer.left if where == "attribute" else self.cache["left"])

    engine = GradientHolder(model := Root().double(), registry=registry((nn.Module, Replays)))
    past = pytest.raises(UnbalancedError, match=r"do not add up .* of layer\.(weight|bias)")
    with engine, past, engine.batch(range(N)):
        losses_of(model(x)).sum().backward()


def test_complex_outputs_are_refused(x) -> None:
    class Turns(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            output = super().forward(x)
            return output, torch.fft.fft(output)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Turns(D, D)

        def forward(self, x: Tensor) -> Tensor:
            output, spectrum = self.layer(x)
            return output + spectrum.abs()

    engine = GradientHolder(model := Root().double(), registry=registry((nn.Module, Replays)))
    refused = pytest.raises(CaptureError, match=r"returned complex numbers: exclude it")
    with engine, refused, engine.batch(range(N)):
        losses_of(model(x)).sum().backward()


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
