"""What a model begins to do in a later batch: samples that it mixes, or puts into another order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.foreign.foreign import assert_same, curved
from tests.silent.compare import WAYS, Counted, drawn
from torch import Tensor, nn
from torch.nn.functional import batch_norm, linear, scaled_dot_product_attention

from ghost_core import WrongSplitError
from ghost_core.testing import GradientHolder, per_sample_gradients

N, T, D = 4, 6, 5
Step = Callable[[Tensor], Tensor]


class Model(nn.Module):
    """Has from the first batch on what steps are made of, though within samples."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.norm, self.step, self.later = nn.LayerNorm(D), step, False
        self.double()

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        h = self.first(x)
        h = (h - h.mean(-1, keepdim=True)) * h.softmax(-1) + linear(h, torch.ones(D, D).double())
        flat = h.flatten(1)
        h = batch_norm(flat, flat.new_zeros(T * D), flat.new_ones(T * D)).view_as(x)
        if self.later:
            h = self.step(h)
        return self.last(self.norm(h).tanh())


def squared(h: Tensor) -> Tensor:
    flat = h.flatten(1)
    return (flat @ flat.mT @ flat).view_as(h)


def attended(h: Tensor) -> Tensor:
    turned = h.transpose(0, 1)
    return scaled_dot_product_attention(turned, turned, turned).transpose(0, 1)


MIXING: dict[str, Step] = {
    "mean": lambda h: h - h.mean(0, keepdim=True),
    "softmax": lambda h: h * h.softmax(0),
    "batch norm": lambda h: batch_norm(h.flatten(1), None, None, training=True).view_as(h),
    "Gram": squared,
    "attention": attended,
    "sums": lambda h: h.cumsum(0),
    "neighbours": lambda h: h + h.roll(1, 0),
    "scale": lambda h: h / h.norm(),
}
"""What mixes samples, most of it by operations that the model has anyway, along another axis."""


def run(engine: GradientHolder, x: Tensor) -> bool:
    """Compare a batch with one autograd call per sample; return whether it is verified."""
    model = engine.model
    plain = Model(model.step)
    plain.load_state_dict(model.state_dict())
    plain.later = model.later
    expected = per_sample_gradients(plain, curved(plain(x)))
    with engine.batch(range(N)) as batch:
        curved(model(x)).sum().backward()
    model.zero_grad()
    held = batch.result.materialize()
    assert_same(held, {name: expected[name] for name in held})
    verified: bool = batch.verified
    return verified


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", MIXING.values(), ids=MIXING.keys())
def test_samples_that_are_mixed_later_are_refused(step: Step, way: str) -> None:
    engine = GradientHolder(Model(step))
    with engine.frozen() if way == "frozen" else engine:
        for _ in range(2):
            assert run(engine, drawn(N, T, D))
        engine.model.later = True
        with pytest.raises(WrongSplitError, match="cannot be split by sample"):
            run(engine, drawn(N, T, D))
        engine.model.later = False
        assert run(engine, drawn(N, T, D))


class Along(nn.Module):
    """Works along an axis, which is another one later."""

    def __init__(self, operation: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.layer, self.operation, self.axis = nn.Linear(D, D).double(), operation, -1

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.layer(x), self.axis)


@pytest.mark.parametrize(
    "operation",
    [Tensor.softmax, Tensor.cumsum, lambda h, axis: h - h.mean(axis, keepdim=True)],
    ids=["softmax", "cumsum", "mean"],
)
def test_another_axis_in_a_later_batch(operation: Callable[[Tensor, int], Tensor]) -> None:
    engine = GradientHolder(Along(operation))

    def batch() -> None:
        with engine.batch(range(N)):
            curved(engine.model(drawn(N, T, D))).sum().backward()

    with engine:
        batch()
        engine.model.axis = 0
        with pytest.raises(WrongSplitError, match="cannot be split by sample"):
            batch()


class Blocks(nn.Module):
    """Works within blocks of 4 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).reshape(-1, 4, D).softmax(1).view_as(x))


def test_blocks_of_steps_that_hold_two_samples_later() -> None:
    """They are of one sample each while samples have 8 steps, or 12, and not where they have 6."""
    engine = GradientHolder(Blocks())

    def batch(n: int, steps: int) -> None:
        x = drawn(n, steps, D)
        expected = per_sample_gradients(engine.model, curved(engine.model(x)))
        with engine.batch(range(n)) as batch:
            curved(engine.model(x)).sum().backward()
        engine.model.zero_grad()
        assert_same(batch.result.materialize(), expected)

    with engine:
        batch(N, 8)
        for n in (N, 2):
            with pytest.raises(WrongSplitError, match="several samples depend on the same rows"):
                batch(n, 6)
            batch(n, 12)


class Flat(Model):
    """Returns all steps of all samples, `[N * T, D]`; layers have rows of these only."""

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.first(x.flatten(0, 1)).view_as(x)
        h = self.step(h) if self.later else h.softmax(1)
        return (self.last(h.flatten(0, 1)),)


class FlatTwice(Flat):
    """Returns steps before samples are mixed, too."""

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.last(x.softmax(1).flatten(0, 1)), *super().forward(x)


@pytest.mark.parametrize("kind", [Flat, FlatTwice])
def test_samples_that_are_mixed_later_are_apart_in_no_other_order(kind: type[Flat]) -> None:
    """Steps of all samples belong together then: as if these were samples."""
    engine = GradientHolder(kind(MIXING["softmax"]))

    def batch() -> None:
        with engine.batch(range(2)):
            curved(engine.model(drawn(2, 4, D))[-1].view(2, -1)).sum().backward()

    with engine:
        batch()
        engine.model.later = True
        with pytest.raises(WrongSplitError, match="does not tell 2 samples apart"):
            batch()


class Besides(Flat):
    """Returns a vector of each sample later, and steps besides, which no vector depends on."""

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.first(x)
        if not self.later:
            return (self.last(h.flatten(0, 1)),)
        return h.mean(1), self.last(h.transpose(0, 1).flatten(0, 1))


def test_an_output_that_tells_no_samples_later_is_refused() -> None:
    engine = GradientHolder(Besides(MIXING["softmax"]))

    def batch() -> None:
        with engine.batch(range(N)):
            sum(curved(each).sum() for each in engine.model(drawn(N, T, D))).backward()

    with engine:
        batch()
        engine.model.later = True
        with pytest.raises(WrongSplitError, match="matter only for outputs"):
            batch()


class Reversed(torch.autograd.Function):
    """Turns samples round where torch does not see it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.flip(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad.flip(0)


STAYING: dict[str, Step] = {
    "another order": lambda h: h.flip(0),
    "another order by a function": Reversed.apply,
    "within samples": lambda h: h - h.mean(1, keepdim=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", STAYING.values(), ids=STAYING.keys())
def test_what_keeps_samples_apart_is_exact(step: Step, way: str) -> None:
    engine = GradientHolder(Model(step))
    with engine.frozen() if way == "frozen" else engine:
        for later in (False, True, True, False):
            engine.model.later = later
            assert run(engine, drawn(N, T, D))


def test_rows_with_owners_that_are_mixed_later_are_refused() -> None:
    """Neither order of two rows of each keeps samples apart."""
    engine = GradientHolder(Model(MIXING["mean"]), row_owner={"*": "rows"})
    x, rows = drawn(2 * N, T, D), torch.arange(2 * N) // 2

    def batch() -> None:
        with engine.batch(range(N)):
            curved(engine.model(x, rows=rows)).sum().backward()

    with engine:
        batch()
        engine.model.later = True
        with pytest.raises(WrongSplitError, match="does not tell 4 samples apart"):
            batch()


class Pooled(nn.Module):
    """Has one parameter of which no owners are told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(D, D), nn.Parameter(torch.rand(D))
        self.double()

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        h = (self.layer(x) * self.scale).tanh()
        return h.new_zeros(N, *h.shape[1:]).index_add(0, rows, h)


def test_owners_of_some_modules_prove_nothing_of_others() -> None:
    engine = GradientHolder(Pooled(), row_owner={"layer": "rows"})
    x = drawn(2 * N, T, D)
    with engine:
        for rows in (torch.arange(2 * N) // 2, torch.tensor([0, 1, 1, 1, 2, 2, 3, 3])):
            expected = per_sample_gradients(engine.model, curved(engine.model(x, rows=rows)))
            with engine.batch(range(N)) as batch:
                curved(engine.model(x, rows=rows)).sum().backward()
            engine.model.zero_grad()
            assert_same(batch.result.materialize(), expected)


def test_rows_with_owners_are_probed_once_for_what_is_new() -> None:
    engine = GradientHolder(Model(lambda h: Counted.apply(h.sin())), row_owner={"*": "rows"})
    x, rows, runs = drawn(2 * N, T, D), torch.arange(2 * N) % N, []
    with engine:
        for later in (False, True, True):
            engine.model.later, Counted.runs = later, 0
            with engine.batch(range(N)):
                curved(engine.model(x, rows=rows)).sum().backward()
            runs.append(Counted.runs)
    assert runs[0] == 0
    assert runs[1] > 1
    assert runs[2] == 1  # the user's own


def test_what_is_not_a_number_proves_nothing_and_refuses_nothing() -> None:
    """A batch that overflows ends in no error; it is not verified, and the next one is."""
    engine = GradientHolder(Model(STAYING["within samples"]))
    with engine:
        assert run(engine, drawn(N, T, D))
        engine.model.later = True
        with engine.batch(range(N)) as batch:
            curved(engine.model(drawn(N, T, D) * torch.nan)).sum().backward()
        engine.model.zero_grad()
        assert not batch.verified
        assert run(engine, drawn(N, T, D))


def test_hooks_of_users_do_not_see_a_later_probe() -> None:
    engine, seen = GradientHolder(Model(STAYING["within samples"])), []

    def hook(module: nn.Module, given: object, arrived: tuple[Tensor, ...]) -> None:
        seen.extend(bool(each.isnan().any()) for each in arrived)

    engine.model.last.register_full_backward_hook(hook)
    with engine:
        for later in (False, True):
            engine.model.later = later
            with engine.batch(range(N)):
                curved(engine.model(drawn(N, T, D))).sum().backward()
    assert seen == [False, False]
