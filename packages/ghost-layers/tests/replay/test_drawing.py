"""Whether calls are taken to draw random numbers, and what becomes of those that do."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ghost_core import SamplerRegistry, WrongSplitError
from ghost_core.state import RandomState
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name
from ghost_layers.attended import attend
from ghost_layers.attention import MultiheadAttentionSampler
from ghost_layers.recurrent import RecurrentCellSampler, RecurrentSampler
from ghost_layers.replay import Formula, ReplaySampler, Way, WrittenOut


class Mistaken(MultiheadAttentionSampler):
    def draws(self, module: nn.Module) -> bool:
        return False


def drawing(module: Any, *inputs: Tensor, **options: Any) -> WrittenOut:
    torch.rand(1), random.random(), np.random.rand()
    return attend(module, *inputs, **options)


class Drawing(MultiheadAttentionSampler):
    def rewritten(self, module: nn.Module) -> Formula | None:
        return drawing

    def draws(self, module: nn.Module) -> bool:
        return False


class Attends(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


def holder(model: nn.Module, sampler: type[ReplaySampler]) -> GradientHolder:
    claim = Claim(dotted_name(nn.MultiheadAttention), sampler, "test")
    return GradientHolder(model, registry=SamplerRegistry([claim]))


def losses(y: Tensor) -> Tensor:
    return y.square().sum((1, 2))


@pytest.mark.parametrize(
    ("sampler", "layer", "expected"),
    [
        (MultiheadAttentionSampler, nn.MultiheadAttention(4, 2), False),
        (MultiheadAttentionSampler, nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (MultiheadAttentionSampler, nn.MultiheadAttention(4, 2, dropout=0.1).eval(), False),
        (RecurrentSampler, nn.LSTM(4, 4, 2), False),
        (RecurrentSampler, nn.LSTM(4, 4, 2, dropout=0.1), True),
        (RecurrentSampler, nn.LSTM(4, 4, 2, dropout=0.1).eval(), False),
        (RecurrentCellSampler, nn.GRUCell(4, 4), False),
        (ReplaySampler, nn.Linear(4, 4), True),
    ],
)
def test_which_layers_draw(sampler: type[ReplaySampler], layer: nn.Module, expected: bool) -> None:
    assert sampler().draws(layer) == expected


def test_what_stands_behind_a_weight_may_draw() -> None:
    class Noisy(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.rand(())

    attention, recurrent = nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)
    nn.utils.parametrize.register_parametrization(attention.out_proj, "weight", Noisy())
    nn.utils.parametrize.register_parametrization(recurrent, "weight_hh_l0", Noisy())
    assert MultiheadAttentionSampler().draws(attention)
    assert RecurrentSampler().draws(recurrent)


def test_generators_are_looked_at_only_for_calls_that_may_draw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked, now = [], RandomState.now

    def noted(*devices: Any) -> RandomState:
        looked.append(devices)
        return now(*devices)

    for dropout in (0.0, 0.1):
        model, x = Attends(dropout), torch.randn(3, 5, 4, dtype=torch.float64)
        engine = holder(model, MultiheadAttentionSampler)
        with engine:
            for _ in range(2):
                with monkeypatch.context() as patched, engine.batch(range(3)):
                    looked.clear()
                    patched.setattr(RandomState, "now", noted)
                    losses(model(x)).sum().backward()
        assert bool(looked) == bool(dropout)


def test_a_call_that_draws_against_its_samplers_word_is_refused() -> None:
    model, x = Attends(0.5), torch.randn(3, 5, 4, dtype=torch.float64)
    engine = holder(model, Mistaken)
    refused = pytest.raises(WrongSplitError, match="returned something else")
    with engine, refused, engine.batch(range(3)):
        losses(model(x)).sum().backward()


def test_a_formula_that_draws_is_not_used(ways: list[Way]) -> None:
    model, x = Attends(), torch.randn(3, 5, 4, dtype=torch.float64)
    plain = copy.deepcopy(model)
    expected = per_sample_gradients(plain, losses(plain(x)))
    engine, before = holder(model, Drawing), RandomState.now()
    with engine:
        for _ in range(2):
            with engine.batch(range(3)) as batch:
                losses(model(x)).sum().backward()
            assert RandomState.now() == before
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], expected[name].norm())
    assert ways == [Way.VMAP]
