from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    Call,
    Record,
    full_precision,
)
from ghost_core.testing import GradientHolder
from ghost_layers.replay import GenericSampler, Way
from ghost_layers.replay.recording import taken_apart

from .modules import Behind, Experts, Gated, Scaled, check, doubles, registry


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (mask.to(x.dtype) @ x) * self.scale


@pytest.mark.parametrize("n", [1, 3, 5])
def test_mask_that_samples_share(n: int, ways: list[Way]) -> None:
    # With five samples, the mask [5, 5] might be one row for each of them.
    check(Behind(Masked()).double(), doubles(n, 5, 4), torch.rand(5, 5) > 0.5)
    assert ways == [Way.BATCH if n == 1 else Way.VMAP]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("noisy", [False, True])
def test_row_that_samples_share(n: int, noisy: bool, ways: list[Way]) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor | None = None) -> Any:
            row = self.table.sin().unsqueeze(0)
            if x is None:
                return row
            if noisy:  # in another order than sample by sample
                x = x * torch.rand(3, len(x), 4, dtype=x.dtype).transpose(0, 1)
            return x * self.table, row

    class Adds(nn.Module):
        def __init__(self, beside: bool) -> None:
            super().__init__()
            self.positions, self.linear, self.beside = Positions(), nn.Linear(4, 4), beside

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            if not self.beside:
                return x + self.positions()
            scaled, row = self.positions(x)
            out: Tensor = scaled * x + row
            return out

    check(Adds(beside=False).double(), doubles(n, 3, 4), lift=True)
    check(Adds(beside=True).double(), doubles(n, 3, 4))
    # What is called on nothing of the samples is not run again.
    assert ways == [Way.BATCH if noisy or n == 1 else Way.VMAP]


def test_no_sample() -> None:
    model = nn.Sequential(nn.PReLU(4)).double()
    engine = GradientHolder(model, registry=registry(), lift=False)
    with engine, engine.batch([]) as batch:
        model(doubles(0, 4)).sum().backward()
    assert batch.result.materialize()["0.weight"].shape == (0, 4)


def test_samples_on_another_axis() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Gated(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.transpose(0, 1)).transpose(0, 1)

    axes = {"block": 1, "block.*": 1}
    check(SequenceFirst().double(), doubles(4, 4, 4), batch_dim=axes)


def test_rows_folded_into_the_batch() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Gated(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    check(Folded().double(), doubles(3, 2, 4))


@pytest.mark.parametrize("early", [True, False])
def test_outputs_that_are_detached(early: bool) -> None:
    def both(module: Scaled, x: Tensor) -> tuple[Tensor, ...]:
        y = x * module.scale
        return (y.detach(), y) if early else (y, y.detach())

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Behind(Scaled(both))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)[early]

    check(Second().double(), doubles(3, 4))


def recorded(module: nn.Module, x: Tensor) -> tuple[Call, Mapping[str, Record], Tensor]:
    """Run a module and record the call as the recorder does; also return a gradient for it."""
    sampler = GenericSampler()
    before = sampler.prepare(module)
    output = module(x)
    names = sampler.owns(module)
    shapes = {name: module.get_parameter(name).shape for name in names}
    call = Call("", module, (x,), {}, (output.detach(),), shapes, before=before)
    with full_precision(x.device):
        records = sampler.record(call)
    slope = torch.randn_like(output)
    return call, records, slope


NARROWED: dict[str, Callable[[], nn.Module]] = {
    "VMAP": lambda: Gated(0.5, dropout=0.0),
    "VMAP with random numbers": lambda: Gated(0.5),
    "BATCH": lambda: Experts(capacity=2),
}


@pytest.mark.parametrize("way", NARROWED)
@pytest.mark.parametrize("samples", [slice(1, 3), torch.tensor([3, 0])])
def test_some_of_the_samples(way: str, samples: slice | Tensor, ways: list[Way]) -> None:
    call, records, slope = recorded(NARROWED[way]().double(), doubles(4, 3, 4))
    assert [each.name for each in ways] == way.split()[:1]
    assert (call.static.plan.random is not None) == ("random" in way)
    with full_precision(slope.device):
        whole = GenericSampler().gradients(call.past(), records, [slope])
        narrow = {name: record.narrow(samples) for name, record in records.items()}
        part = GenericSampler().gradients(call.past(), narrow, [slope[samples]])
    for name, gradient in part.items():
        torch.testing.assert_close(gradient.materialize(), whole[name].materialize()[samples])


def test_gradients_that_do_not_fit_at_once(
    monkeypatch: pytest.MonkeyPatch, ways: list[Way]
) -> None:
    monkeypatch.setattr("ghost_layers.replay.gradients._AT_ONCE", 8)
    check(Behind(Gated(0.5, dropout=0.0)).double(), doubles(7, 3, 4))
    assert ways == [Way.VMAP]


def test_tensors_that_differ_in_their_gradients_alone_are_two() -> None:
    x = doubles(3, 4).requires_grad_()
    call = Call("", None, (x, x.detach(), x), {}, (x,), {})
    _, _, inputs, _ = taken_apart(call, None, 3)
    assert [value.requires_grad for value in inputs] == [True, False]
