from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    WrongSplitError,
)
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_layers.replay import Way

from .modules import (
    Behind,
    Experts,
    Gated,
    Scaled,
    Zero,
    check,
    doubles,
    losses,
    registry,
    unordered_noise,
)


def test_later_batches_are_run_in_the_same_way(ways: list[Way]) -> None:
    model = Behind(Gated(0.1)).double()
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine:
        for n in (4, 3, 4):
            inputs = doubles(n, 3, 4)
            torch.manual_seed(n)
            expected = per_sample_gradients(model, losses(model(inputs)))
            torch.manual_seed(n)
            with engine.batch(range(n)) as batch:
                losses(model(inputs)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], expected[name].norm())
    assert ways == [Way.VMAP]


def test_later_batch_that_needs_another_way(ways: list[Way]) -> None:
    def branch_by_value(module: Scaled, x: Tensor) -> Tensor:
        if x.shape[1] > 1 and x.sum() > 1e9:  # never, but vmap cannot know
            return x
        return x * module.scale

    model = Behind(Scaled(branch_by_value)).double()
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine:
        for tokens in (1, 4):
            inputs = doubles(2, tokens, 4)
            expected = per_sample_gradients(model, losses(model(inputs)))
            with engine.batch(range(2)) as batch:
                losses(model(inputs)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], expected[name].norm())
    assert ways == [Way.VMAP, Way.BATCH]


def refused_later(function: Callable[..., Tensor], change: Callable[[], object]) -> None:
    """Run a batch, then another one in which something changes between forward and backward."""
    model, x = Behind(Scaled(function)).double(), doubles(3, 4)
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine:
        with engine.batch(range(3)):
            losses(model(x)).sum().backward()
        with engine.batch(range(3)):
            loss = losses(model(x)).sum()
            change()
            loss.backward()


class TwoBranches(nn.Module):
    """Uses one of two scales by the values that it gets."""

    def __init__(self, inside: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        positive = (x > 0).to(x)
        return x * positive * self.one + self.inside(x * (1 - positive), self.other)


def branches(inside: Callable[[Tensor, Tensor], Tensor], signs: str) -> None:
    """Run batches of positive and negative values through two branches."""
    model = TwoBranches(inside).double()
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine:
        for sign in signs:
            x = doubles(3, 4).abs() * (1 if sign == "+" else -1)
            expected = per_sample_gradients(model, losses(model(x)))
            with engine.batch(range(3)) as batch:
                losses(model(x)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], max(expected[name].norm(), torch.tensor(1e-9)))


def test_a_way_is_found_once_though_a_parameter_has_no_gradient(ways: list[Way]) -> None:
    branches(torch.mul, "+++")
    assert ways == [Way.VMAP]


def test_a_way_is_proven_anew_once_a_parameter_has_a_gradient(ways: list[Way]) -> None:
    branches(torch.mul, "++-+-")
    assert ways == [Way.VMAP, Way.VMAP]


def test_mixing_in_a_branch_that_is_taken_later_is_refused() -> None:
    def mixed(x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.detach() + mean_of_all(x) * (scale - scale.detach())

    with pytest.raises(WrongSplitError, match=r"depends on other samples"):
        branches(mixed, "+-")


def test_a_later_call_that_does_not_return_what_it_did_is_refused() -> None:
    factor = [2.0]

    def scaled(module: Scaled, x: Tensor) -> Tensor:
        return x * module.scale * factor[0]

    with pytest.raises(WrongSplitError, match=r"(?s)module .*it returned something else"):
        refused_later(scaled, lambda: factor.append(factor.pop() + 1))


def test_a_later_call_that_writes_into_its_inputs_is_refused() -> None:
    writes = []

    def scaled(module: Scaled, x: Tensor) -> Tensor:
        if writes:
            x.mul_(1)  # which shows in its version alone
        return x * module.scale

    with pytest.raises(WrongSplitError, match=r"writes into its inputs"):
        refused_later(scaled, lambda: writes.append(True))


def mean_of_all(x: Tensor) -> Tensor:
    return x.mean(0, keepdim=True).expand_as(x)


class TwoGates(nn.Module):
    """Two gates of zero in a row, of which neither has a gradient."""

    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.outer, self.inner = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer * (self.inner * x * self.inside(x))


def test_gates_in_a_row_that_move_later() -> None:
    # Then the values are still too small to show which random numbers were drawn.
    model = Behind(TwoGates(unordered_noise)).double()
    check(model, doubles(4, 3, 4))
    nn.init.constant_(model.module.outer, 1e-7)
    nn.init.constant_(model.module.inner, 1e-7)
    check(model, doubles(4, 3, 4))


def test_mixing_behind_gates_in_a_row_is_refused_when_they_move() -> None:
    model = Behind(TwoGates(mean_of_all)).double()
    check(model, doubles(4, 3, 4), layers="module.*")
    nn.init.constant_(model.module.outer, 1e-7)
    nn.init.constant_(model.module.inner, 1e-7)
    with pytest.raises(WrongSplitError, match=r"depends on other samples"):
        check(model, doubles(4, 3, 4), layers="module.*")


def test_noise_behind_a_gate_that_is_not_asked_for(ways: list[Way]) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * (self.scale * x * unordered_noise(x))

    model = Behind(Gate()).double()
    check(model, doubles(4, 3, 4), layers="linear,*scale")
    nn.init.constant_(model.module.gate, 1e-14)
    check(model, doubles(4, 3, 4), layers="linear,*scale")
    assert ways == [Way.BATCH]


def test_way_that_depends_on_parameters(ways: list[Way]) -> None:
    # With other parameters, samples would be by themselves.
    def mix(module: Scaled, x: Tensor) -> Tensor:
        if module.scale.abs().max() < 1e-3:
            return x + module.scale * x.detach().mean(0)
        return x + module.scale * x

    model = Behind(Scaled(mix)).double()
    nn.init.constant_(model.module.scale, 1e-4)
    check(model, doubles(4, 4))
    assert ways == [Way.BATCH]


def test_parameters_that_cannot_be_others(ways: list[Way]) -> None:
    def blow_up(module: Scaled, x: Tensor) -> Tensor:
        return x + module.scale * x.detach().mean(0) / (module.scale == 0)

    check(Behind(Zero(blow_up)).double(), doubles(4, 4))
    assert ways == [Way.BATCH]


@pytest.mark.parametrize("how", ["hook", "batch size"])
def test_gradients_that_are_others_for_one_sample_are_those_of_the_call(how: str) -> None:
    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            if how == "batch size":
                return x * (self.scale if len(x) > 1 else self.scale.detach())
            scaled = x * self.scale
            if scaled.requires_grad:
                scaled.register_hook(lambda grad: grad / len(grad))
            return scaled

    model, x = Behind(Unlike()).double(), doubles(5, 4)
    engine = GradientHolder(model, registry=registry(), lift=False)
    expected = per_sample_gradients(model, model(x).sin().sum(1), ["module.scale"])
    with engine.frozen(), engine.batch(range(5)) as batch:
        model(x).sin().sum().backward()
    torch.testing.assert_close(batch.result.materialize()["module.scale"], expected["module.scale"])


def test_outputs_of_all_samples_are_compared(ways: list[Way]) -> None:
    # The gradients of the first and the last sample are the same in both ways.
    def middle(module: Scaled, x: Tensor) -> Tensor:
        weights = [1.0, 2.0, 1.0] if len(x) == 3 else [1.0] * len(x)
        return x * module.scale * x.new_tensor(weights).reshape(-1, *[1] * (x.dim() - 1))

    check(Behind(Scaled(middle)).double(), doubles(3, 2, 4))
    assert ways == [Way.BATCH]


class Leaking(torch.autograd.Function):
    """Adds a row's gradient, times zero, to the row before, as kernels of some CPUs do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        before = torch.cat([grad[1:], torch.zeros_like(grad[:1])])
        return grad + 0 * before


def leaking(module: Scaled, x: Tensor) -> Tensor:
    out: Tensor = Leaking.apply(x * 1) * module.scale
    return out


def test_nan_that_leaks_in_half_precision_only(ways: list[Way]) -> None:
    x = torch.randn(4, 3, 4)
    check(Behind(Scaled(leaking)).bfloat16(), x.bfloat16(), tolerance=3e-2)
    assert ways == [Way.BATCH]
    with pytest.raises(WrongSplitError, match=r"depends on other samples"):
        check(Behind(Scaled(leaking)).double(), x.double(), layers="module.*")


def test_anomaly_detection_does_not_take_nan_for_a_mistake() -> None:
    with torch.autograd.set_detect_anomaly(True):
        check(Behind(Experts()).double(), doubles(4, 3, 4))


def test_gradients_that_cannot_be_computed_again_are_refused() -> None:
    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            if not grad.all():
                raise ValueError("zeros")
            return grad

    def picky(module: Scaled, x: Tensor) -> Tensor:
        out: Tensor = Picky.apply(x * module.scale)
        return out

    model = Behind(Scaled(picky)).double()
    engine = GradientHolder(model, registry=registry(), lift=False, layers="module.*")
    with (
        engine,
        pytest.raises(WrongSplitError, match=r"differentiating it again failed with ValueError"),
        engine.batch(range(3)),
    ):
        model(doubles(3, 4))


def test_rows_of_samples_that_are_shared_as_if_they_were_a_table_are_refused() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.inner = nn.Linear(4, 4), Adds()

        def forward(self, x: Tensor) -> Tensor:
            made = self.linear(x)
            out: Tensor = self.inner(made, made.sin())
            return out

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return x * self.scale + other.mean(0)

    with pytest.raises(WrongSplitError, match=r"depends on other samples"):
        check(Shares().double(), doubles(3, 4), layers="inner.*")


def test_mixing_of_inputs_that_need_no_gradients_is_refused() -> None:
    def by_outputs(module: Scaled, x: Tensor) -> Tensor:
        return x * module.scale + x.mean(0)

    def by_gradients(module: Scaled, x: Tensor) -> Tensor:
        return x + 0.0 * module.scale + module.scale.sub(module.scale.detach()) * x.mean(0)

    for function in (by_outputs, by_gradients):
        with pytest.raises(WrongSplitError, match=r"depends on other samples"):
            check(Scaled(function).double(), doubles(3, 4))


def test_mixing_into_later_samples_alone_is_refused() -> None:
    def shifted(module: Scaled, x: Tensor) -> Tensor:
        return x * module.scale + torch.cat([torch.zeros_like(x[:1]), x[:-1]])

    with pytest.raises(WrongSplitError, match=r"depends on other samples"):
        check(Behind(Scaled(shifted)).double(), doubles(3, 4), layers="module.*")


def test_kernels_without_gradients_are_not_used() -> None:
    # They return zeros at padding, which the call with gradients did not.
    class Encodes(Gated):
        def __init__(self) -> None:
            super().__init__(0.1)
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -1] = True
            return self.gate * self.layers(x, src_key_padding_mask=padding)

    model = Behind(Encodes()).double().eval()
    for parameter in model.module.layers.parameters():
        parameter.requires_grad_(False)
    check(model, doubles(3, 2, 4), layers="linear,*.gate")
