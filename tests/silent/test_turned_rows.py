"""Rows whose axes are put in another order in later batches only, which no pick or join shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.foreign.foreign import assert_same
from tests.silent.compare import Counted, drawn
from torch import Tensor, nn

from ghost_core.testing import GradientHolder, per_sample_gradients

N, T, D = 4, 6, 5
Body = Callable[["Model", Tensor], Tensor]
"""From samples `[N, T, D]` to `[N, T, D]`."""


class Model(nn.Module):
    """Layers, of which the second sees rows as a body says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(D, D) for _ in range(3))
        self.double()

    def forward(self, x: Tensor, body: Body) -> Tensor:
        return body(self, Counted.apply(self.first(x).tanh()))


def flat(m: Model, x: Tensor) -> Tensor:
    return m.second(x.flatten(0, 1)).view(x.shape)


def turned(m: Model, x: Tensor) -> Tensor:
    return m.second(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], N, D).transpose(0, 1)


def turned_within_one(m: Model, x: Tensor) -> Tensor:
    """The axis of samples is the second one, of which the first tells nothing."""
    rows = m.second(x[None].transpose(1, 2).flatten(0, 2))
    return rows.view(1, x.shape[1], N, D).transpose(1, 2)[0]


def permuted(m: Model, x: Tensor) -> Tensor:
    rows = m.second(x.permute(1, 0, 2).reshape(-1, D))
    return rows.view(x.shape[1], N, D).permute(1, 0, 2)


def reshaped(m: Model, x: Tensor) -> Tensor:
    """Torch makes a view of what is not contiguous in another way while ghost watches."""
    return m.second(x).mT.reshape(N, D, -1, 1)[..., 0].mT


def by_halves(m: Model, x: Tensor) -> Tensor:
    """Samples are one axis no longer, so that none has their number."""
    rows = m.second(x.unflatten(0, (2, N // 2)).transpose(0, 1).flatten(0, 1))
    return rows.unflatten(0, (N // 2, 2)).transpose(0, 1).flatten(0, 1)


def by_steps(m: Model, x: Tensor) -> Tensor:
    rows = m.second(x.unfold(0, 2, 2).movedim(-1, 0).flatten(0, 1))
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def by_strides(m: Model, x: Tensor) -> Tensor:
    t, shape = x.shape[1], (2, 2, x.shape[1], D)
    strides = t * D, 2 * t * D, D, 1
    rows = m.second(x.as_strided(shape, strides).reshape(x.shape))
    return rows.as_strided(shape, strides).reshape(x.shape)


def alike(m: Model, x: Tensor) -> Tensor:
    """Each row three times, next to one another."""
    return m.second(x[:, None].expand(N, 3, -1, D).flatten(0, 1)).view(N, 3, -1, D).sum(1)


def alike_in_turn(m: Model, x: Tensor) -> Tensor:
    return m.second(x[None].expand(3, N, -1, D).flatten(0, 1)).view(3, N, -1, D).sum(0)


def asserted(engine: GradientHolder, body: Body, steps: int) -> int:
    """Compare a batch with one autograd call per sample; return how many probes there were."""
    model, x = engine.model, drawn(N, steps, D)
    expected = per_sample_gradients(model, model(x, body).sin().square().sum((1, 2)))
    Counted.runs = 0
    with engine.batch(range(N)) as batch:
        model(x, body).sin().square().sum().backward()
    model.zero_grad()
    assert_same(batch.result.materialize(), expected)
    return Counted.runs - 1


def crossed(m: Model, x: Tensor) -> Tensor:
    """Axes within samples change places before."""
    return flat(m, x.mT.contiguous().mT)


def crossed_and_turned(m: Model, x: Tensor) -> Tensor:
    return turned(m, x.mT.contiguous().mT)


@pytest.mark.parametrize(("before", "after"), [(flat, turned), (turned, flat),
    (crossed, crossed_and_turned), (crossed_and_turned, crossed),
    (flat, by_halves), (flat, permuted), (flat, turned_within_one),
    (flat, by_steps), (flat, by_strides), (alike, alike_in_turn),
    (alike_in_turn, alike)])  # fmt: skip
def test_exact_in_every_batch(before: Body, after: Body) -> None:
    engine = GradientHolder(Model())
    with engine:
        for body in (before, after, before, after):
            asserted(engine, body, T)


@pytest.mark.parametrize(("before", "after"), [(flat, turned), (turned, flat)])
def test_exact_where_a_layer_is_new_in_the_other_order(before: Body, after: Body) -> None:
    """The pass is probed for the layer, and tells of all others, too."""
    engine = GradientHolder(Model())
    with engine:
        for body in (before, lambda m, x: m.third(after(m, x)), before):
            asserted(engine, body, T)


@pytest.mark.parametrize("body", [turned, turned_within_one, permuted, alike_in_turn, reshaped])
def test_other_sizes_cost_nothing(body: Body) -> None:
    """Samples of other lengths in the same order are where they were."""
    engine = GradientHolder(Model())
    with engine:
        probes = [asserted(engine, body, steps) for steps in (6, 7, 5, 6)]
    assert probes[0] > 0
    assert not any(probes[1:])
