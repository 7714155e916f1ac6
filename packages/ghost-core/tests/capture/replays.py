"""Samplers that run modules again, and modules to run them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghost_core import Dense, GradientSampler, PerSampleGradient, Record, SamplerRegistry
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
