"""Bare parameters that are followed instead of running their module again, or given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import GhostError, WrongSplitError
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.testing.cases.roots import Unseen
from ghost_layers.replay import Way

from .modules import Behind, Scaled, check, doubles, losses, registry

N, T, D = 3, 2, 4


class Token(nn.Module):
    """Puts a learned token before the others, and positions on all."""

    def __init__(self, expand: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.token, self.positions = (nn.Parameter(torch.randn(1, size, D)) for size in (1, T + 1))
        self.expand, self.linear = expand, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.cat([self.expand(self.token, len(x)), x], dim=1))
        return out - self.positions


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "added": lambda: Scaled(lambda m, x: m.scale + x),
    "subtracted": lambda: Scaled(lambda m, x: (x - m.scale).sin() + (m.scale - x).cos()),
    "multiplied": lambda: Scaled(lambda m, x: (m.scale * x).sin() * m.scale),
    "multiplied with a mask": lambda: Scaled(lambda m, x: x + m.scale * (x > 0)),
    "divided by": lambda: Scaled(lambda m, x: x / (2 + m.scale)),
    "divided": lambda: Scaled(lambda m, x: m.scale / (2 + x.square())),
    "in another shape": lambda: Scaled(lambda m, x: x.mT * m.scale.view(1, D, 1)),
    "computed from": lambda: Scaled(lambda m, x: x * m.scale.exp().cumsum(0)),
    "by position": lambda: Scaled(lambda m, x: x.mT.flatten(1) * m.scale.repeat(T)),
    "a number for all": lambda: Scaled(lambda m, x: x * m.scale[0]),
    "contracted": lambda: Scaled(
        lambda m, x: torch.einsum("bqd,dk->bqk", x, m.scale[:, None] * m.scale)
    ),
    "contracted, first": lambda: Scaled(lambda m, x: torch.einsum("d,bqd->bqd", m.scale, x)),
    "beside a number": lambda: Scaled(lambda m, x: (x * m.scale, m.scale.sum().exp())),
    "token, expanded": lambda: Token(lambda token, n: token.expand(n, -1, -1)),
    "token, repeated": lambda: Token(lambda token, n: token.repeat(n, 1, 1)),
    "token, stacked": lambda: Token(lambda token, n: torch.cat([token] * n)),
}
"""Modules whose parameters meet samples in operations with a closed form."""


def differentiated(module: Scaled, x: Tensor) -> Tensor:
    """Return a slope, with a graph, of what a parameter met samples in."""
    given = x if x.requires_grad else x.detach().requires_grad_()
    made = (given * module.scale).square().sum()
    (slope,) = torch.autograd.grad(made, given, create_graph=True)
    return slope


def checkpointed(module: Scaled, x: Tensor) -> Tensor:
    run = torch.utils.checkpoint.checkpoint
    out: Tensor = run(lambda given: given * module.scale, x, use_reentrant=False)
    return out


GIVEN_UP: dict[str, Callable[[], nn.Module]] = {
    "in a function": lambda: Scaled(lambda m, x: x * Unseen.apply(m.scale)),
    "computed from, in a function": lambda: Scaled(lambda m, x: x * Unseen.apply(m.scale.exp())),
    "first seen, then not": lambda: Scaled(lambda m, x: x * m.scale + Unseen.apply(m.scale)),
    "added in place": lambda: Scaled(lambda m, x: x.sin().add_(m.scale)),
    "in place": lambda: Scaled(lambda m, x: x.sin().mul_(m.scale)),
    "each by itself": lambda: Scaled(lambda m, x: torch.vmap(lambda row: row * m.scale)(x)),
    "without a closed form": lambda: Scaled(lambda m, x: torch.hypot(x, m.scale)),
    "closed, then open": lambda: Scaled(lambda m, x: torch.hypot(x * m.scale, m.scale)),
    "returned beside": lambda: Scaled(lambda m, x: (x * m.scale, m.scale.exp().expand_as(x))),
    "recomputed": lambda: Scaled(checkpointed),
    "differentiated": lambda: Scaled(differentiated),
}
"""Modules that have to be run again."""


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_has_a_closed_form_is_followed(name: str, frozen: bool, ways: list[Way]) -> None:
    model = Behind(FOLLOWED[name]()).double()
    engine = check(model, doubles(N, T, D), frozen=frozen, lift=True)
    assert ways == []
    assert "module." in engine.coverage().partition("the same for all samples")[2]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", GIVEN_UP)
def test_what_cannot_be_followed_runs_again(name: str, frozen: bool, ways: list[Way]) -> None:
    model = Behind(GIVEN_UP[name]()).double()
    engine = check(model, doubles(N, T, D), frozen=frozen, lift=True)
    assert ways != []
    assert "the same for all samples" not in engine.coverage()


class Within(nn.Module):
    """Gives a module a value to combine with a parameter of its own, which it hides elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.linear = nn.Parameter(torch.randn(T, D)), nn.Linear(D, D)
        self.inner = Hiding()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.linear(x), self.positions * 2)
        return out


class Hiding(Scaled):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return x * Unseen.apply(self.scale) + self.scale * positions  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [False, True])
def test_one_parameter_is_followed_where_another_is_given_up(frozen: bool, ways: list[Way]) -> None:
    engine = check(Within().double(), doubles(N, T, D), frozen=frozen, lift=True)
    assert ways != []
    followed = engine.coverage().partition("the same for all samples")[2]
    assert "positions" in followed
    assert "scale" not in followed


def batches(model: nn.Module, sizes: Sequence[int] = (N, N + 2, N)) -> None:
    """Compare several batches of one engine with autograd."""
    engine = GradientHolder(model, registry=registry())
    with engine:
        for n in sizes:
            x = doubles(n, T, D)
            expected = per_sample_gradients(model, losses(model(x)))
            with engine.batch(range(n)) as batch:
                losses(model(x)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], expected[name].norm())


@pytest.mark.parametrize("kind", ["multiplied", "token, expanded"])
def test_later_batches_are_followed(kind: str, ways: list[Way]) -> None:
    batches(Behind(FOLLOWED[kind]()).double())
    assert ways == []


def test_one_call_that_cannot_be_followed_lets_all_later_ones_run_again(ways: list[Way]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.inner = Scaled(lambda m, x: x * m.scale if x.dim() == 3 else x.hypot(m.scale))

        def forward(self, x: Tensor) -> Any:
            return self.inner(self.linear(self.inner(x))[:, 0])

    batches(Twice().double())
    assert ways != []


def test_what_was_followed_runs_again_once_a_checkpoint_recomputes_it(ways: list[Way]) -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.inner = nn.Linear(D, D), Scaled()

        def forward(self, x: Tensor) -> Any:
            run = torch.utils.checkpoint.checkpoint if self.training else plainly
            return run(self.inner, self.linear(x), use_reentrant=False)

    def plainly(inner: nn.Module, x: Tensor, use_reentrant: bool) -> Any:
        return inner(x)

    model = Recomputed().double()
    engine, found = GradientHolder(model, registry=registry()), []
    with engine:
        for training in (False, True, True):
            x = doubles(N, T, D)
            expected = per_sample_gradients(model.train(training), losses(model(x)))
            with engine.batch(range(N)) as batch:
                losses(model(x)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], expected[name].norm())
            found.append(len(ways))
    assert found == [0, 1, 1]


def test_a_number_for_all_samples_that_the_loss_uses_is_refused() -> None:
    def run(model: nn.Module) -> None:
        out, number = model(doubles(N, T, D))
        (losses(out) * number).sum().backward()

    model = Behind(Scaled(lambda m, x: (x * m.scale, m.scale.sum().exp()))).double()
    engine = GradientHolder(model, registry=registry())
    for attached in (engine, engine.frozen()):
        with attached, pytest.raises(GhostError), engine.batch(range(N)):
            run(model)


def test_another_function_in_a_later_batch_is_refused() -> None:
    unseen = []

    def changing(module: Scaled, x: Tensor) -> Tensor:
        return x * (Unseen.apply(module.scale) if unseen else module.scale)

    model = Behind(Scaled(changing)).double()
    engine = GradientHolder(model, registry=registry())
    x = doubles(N, T, D)
    with engine:
        with engine.batch(range(N)):
            losses(model(x)).sum().backward()
        unseen.append(True)
        refused = pytest.raises(WrongSplitError, match=r"module\.scale: used in .* UnseenBackward")
        with refused, engine.batch(range(N)):
            losses(model(x)).sum().backward()


def step(model: nn.Module, x: Tensor, then: Callable[[], Tensor]) -> None:
    """Do something before the backward pass, and add what it returns to the loss."""
    loss = losses(model(x)).sum()
    (loss + then().sum()).backward()


def test_what_was_written_to_afterwards_is_refused() -> None:
    def written(module: Scaled, x: Tensor) -> Tensor:
        given = x.sin()
        made = given * module.scale
        kept.append(given)
        return made

    kept: list[Tensor] = []
    model = Behind(Scaled(written)).double()
    engine = GradientHolder(model, registry=registry())
    with engine, pytest.raises(WrongSplitError, match=r"written to"), engine.batch(range(N)):
        step(model, doubles(N, T, D), lambda: kept[0].detach().zero_())


def test_what_mixes_samples_before_a_parameter_is_exact_and_after_it_refused() -> None:
    def before(module: Scaled, x: Tensor) -> Tensor:
        return module.scale * (x - x.mean(0))

    def after(module: Scaled, x: Tensor) -> Tensor:
        y = module.scale * x
        return y - y.mean(0)

    check(Scaled(before).double(), doubles(N, T, D), lift=True)
    for mixing in (partial(Behind, Scaled(before)), partial(Scaled, after)):
        with pytest.raises(WrongSplitError, match=r"gradients cannot be split by sample"):
            check(mixing().double(), doubles(N, T, D), lift=True)


def test_what_only_the_loss_depends_on_is_refused() -> None:
    class Aside(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            self.aside = x.transpose(0, 1) * self.scale
            return x * self.scale

    model = Behind(Aside()).double()
    x = doubles(D, D, D)
    engine = GradientHolder(model, registry=registry())
    with engine, pytest.raises(WrongSplitError, match=r"did not depend"), engine.batch(range(D)):
        step(model, x, lambda: losses(model.module.aside.transpose(0, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_followed(dtype: torch.dtype, ways: list[Way]) -> None:
    model = Behind(Scaled(lambda m, x: x * m.scale + functional.relu(x))).to(dtype)
    check(model, torch.randn(N, 32, D).to(dtype), lift=True, tolerance=3e-2)
    assert ways == []
