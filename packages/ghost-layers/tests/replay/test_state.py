from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.testing.snapshots import live_tensors

from .modules import Behind, Gated, Scaled, check, doubles, losses, registry


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing(training: bool) -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.block = nn.Linear(4, 4), Gated(0.1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, self.linear(x), use_reentrant=False)
            return out

    class Inside(Gated):
        def forward(self, x: Tensor) -> Tensor:
            inner: Tensor = checkpoint(
                lambda x: self.dropout(self.linear(self.norm(x))), x, use_reentrant=False
            )
            return x + self.gate * inner

    check(Outside().double().train(training), doubles(3, 2, 4))
    check(Behind(Inside(0.1)).double().train(training), doubles(3, 2, 4))


def test_hooks_on_saved_tensors() -> None:
    with torch.autograd.graph.save_on_cpu():
        check(Behind(Gated(0.1)).double(), doubles(3, 2, 4))


def test_modes_that_change_before_the_backward_pass() -> None:
    model, inputs = Behind(Gated(0.1)).double(), doubles(3, 2, 4)
    torch.manual_seed(1)
    expected = per_sample_gradients(model, losses(model(inputs)))
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine, engine.batch(range(3)) as batch:
        torch.manual_seed(1)
        loss = losses(model(inputs)).sum()
        model.eval()
        model.module.dropout.p = 0.1
        loss.backward()
        assert not any(module.training for module in model.modules())
    for name, held in batch.result.materialize().items():
        assert_within(held, expected[name], expected[name].norm())


def test_buffers_that_the_call_writes() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))
            self.register_buffer("drift", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.drift += x.detach().mean(0)
            return x * self.scale + self.drift

    check(Behind(Drifting()).double(), doubles(3, 4))


def test_attributes_that_the_call_writes() -> None:
    def count(module: Any, x: Tensor) -> Tensor:
        module.calls.append(len(module.calls))
        return x * module.scale * len(module.calls)

    model = Behind(Scaled(count)).double()
    model.module.calls = []
    check(model, doubles(3, 4))
    assert model.module.calls == [0]


def test_generator_of_the_module() -> None:
    def noisy(module: Any, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=module.generator, dtype=x.dtype)
        return x * module.scale * noise

    model, inputs = Behind(Scaled(noisy)).double(), doubles(3, 4)
    model.module.generator = torch.Generator().manual_seed(0)
    expected = per_sample_gradients(model, losses(model(inputs)))
    state = model.module.generator.get_state()
    model.module.generator.manual_seed(0)
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine, engine.batch(range(3)) as batch:
        losses(model(inputs)).sum().backward()
    assert torch.equal(model.module.generator.get_state(), state)
    for name, held in batch.result.materialize().items():
        assert_within(held, expected[name], expected[name].norm())


def test_tensors_left_from_earlier_calls_are_released() -> None:
    def remember(module: Any, x: Tensor) -> Tensor:
        module.last = [x * module.scale]
        out: Tensor = module.last[0]
        return out

    model = Behind(Scaled(remember)).double()
    engine = GradientHolder(model, registry=registry(), lift=False, verify=False)
    counts: list[int] = []
    with engine:
        for _ in range(3):
            for _ in range(3):
                with engine.batch(range(2)):
                    losses(model(doubles(2, 4))).sum().backward()
            counts.append(live_tensors())
    assert counts[1] == counts[2]  # before, what other tests left may be let go


def test_objects_of_the_users_are_not_written_to() -> None:
    class Writes(nn.Module):
        """Counts its calls in what it has and in what it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))
            self.seen, self.counter = SimpleNamespace(calls=0), Counter()
            self.numbers = np.zeros(1)
            self.method = self.scaled

        def scaled(self, x: Tensor) -> Tensor:
            self.seen.calls += 1
            return x * self.scale

        def forward(self, x: Tensor, context: SimpleNamespace) -> Tensor:
            context.calls += 1
            context.inner.append(1)
            self.counter["calls"] += 1
            self.numbers[0] += 1
            return self.method(x)

    model, x = Behind(Writes()).double(), doubles(3, 4)
    engine = GradientHolder(model, registry=registry(), lift=False)
    context = SimpleNamespace(calls=0, inner=[])
    expected = per_sample_gradients(model, model(x, SimpleNamespace(calls=0, inner=[])).sum(1))
    with engine, engine.batch(range(3)) as batch:
        model(x, context).sum().backward()
    for name, gradient in batch.result.materialize().items():
        torch.testing.assert_close(gradient, expected[name])
    written = next(module for module in model.modules() if isinstance(module, Writes))
    assert (context.calls, context.inner) == (1, [1])
    assert (written.seen.calls, written.counter["calls"], written.numbers[0]) == (2, 2, 2)
