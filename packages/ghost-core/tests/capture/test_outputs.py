"""What a module returns beside rows on axis 0: other axes, scalars, parameters, complex numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    CaptureError,
    Dense,
    GradientSampler,
    PerSampleGradient,
    Record,
    UnbalancedError,
    WrongSplitError,
)
from ghost_core.sampler import Call, PastCall
from ghost_core.testing import GradientHolder, per_sample_gradients

from .replays import D, Inputs, N, Replays, T, assert_exact, losses_of, registry


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, T, D, dtype=torch.float64)


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


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_outputs_are_refused(layout) -> None:
    model = nn.Sequential(nn.Linear(D, D)).double()
    rows = [torch.randn(length, D).double() for length in (2, 5)]
    engine = GradientHolder(model, registry=registry())
    refused = pytest.raises(CaptureError, match=r"0 \[.*\] returned a nested tensor: pad it, or")
    with engine, refused, engine.batch(range(2)):
        sum(
            each.sum() for each in model(torch.nested.nested_tensor(rows, layout=layout))
        ).backward()
