"""A third-party plugin: a layer with its sampler, an engine, a projection, a policy, a command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ghost_core import (
    Batch,
    Call,
    Command,
    Dense,
    Engine,
    GradientSampler,
    Pass,
    PastCall,
    PerSampleGradient,
    Policy,
    Projection,
    Record,
    TrackedParameter,
    hookimpl,
)

# A layer, and what its per-sample gradients look like.


class Scale(nn.Module):
    """Multiplies each feature by a learned number."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


@dataclass(frozen=True)
class Inputs(Record):
    """What the backward pass needs: the layer's inputs, `[N, T, d]`."""

    x: Tensor


class ScaleSampler(GradientSampler):
    """Per-sample gradients of `Scale`: output gradient times input, summed over tokens."""

    parameters = ("weight",)

    def record(self, call: Call) -> Mapping[str, Record]:
        return {"weight": Inputs(_tokens(call.argument(0, "inputs")))}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        inputs = records["weight"]
        assert isinstance(inputs, Inputs)
        assert grads[0] is not None
        return {"weight": Dense(_tokens(grads[0]) * inputs.x)}


def _tokens(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], values.shape[1:-1].numel(), values.shape[-1])


# An engine: how many entries of each sample's gradient are positive, less those that are negative.


class SignAgreementEngine(Engine[Tensor]):
    """Adds up the signs of each sample's gradient over all parameters, `[N]`.

    A parameter may be used several times. Its gradient is the sum of what arrives, of which the
    sign is known at the end only. Entries that are lost in rounding beside the largest count zero.
    """

    def on_start(self, batch: Batch[Tensor]) -> None:
        self._gradients = {
            parameter.name: torch.zeros(batch.n, parameter.shape.numel(), dtype=torch.float64)
            for parameter in self.parameters
        }

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        rows = self._gradients[parameter.name]
        rows[pass_.samples] += gradient.materialize().reshape(gradient.n, rows.shape[1]).cpu()

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        rows = torch.cat(list(self._gradients.values()), dim=1)
        counted = rows.abs() > 1e-6 * rows.abs().amax(1, keepdim=True)
        return (rows.sign() * counted).sum(1)

    def on_close(self) -> None:
        self._gradients = {}


# A projection: keeps a random subset of coordinates.


class CoordinateProjection(Projection):
    """Keeps k of n coordinates, times √(n/k)."""

    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        kept = torch.randperm(n, generator=generator)[:k]
        return nn.functional.one_hot(kept, n).to(torch.float32) * (n / k) ** 0.5


# A command: `ghost agreement --path FILE`.


@dataclass(frozen=True)
class Agreement:
    """Print the signs of each row of a file, added up.

    Args:
        path: File of gradients [N, d], as numpy saves it.
    """

    path: Path

    def run(self) -> int:
        for row in np.load(self.path):
            print(int(np.sign(row).sum()))
        return 0


# A policy: trains on those that help more than most.


@dataclass(frozen=True)
class AboveMedian(Policy):
    """Chooses candidates whose dot is above the median times a factor, in their own order."""

    factor: float = 1.0

    def choose(self, dots: Tensor, gram: Tensor | None) -> Tensor:
        return (dots > self.factor * dots.median()).nonzero().flatten()


# What the plugin offers.


@hookimpl
def ghost_samplers() -> dict[type[nn.Module], type[GradientSampler]]:
    return {Scale: ScaleSampler}


@hookimpl
def ghost_engines() -> dict[str, type[Engine[Tensor]]]:
    return {"sign_agreement": SignAgreementEngine}


@hookimpl
def ghost_projections() -> dict[str, type[Projection]]:
    return {"coordinates": CoordinateProjection}


@hookimpl
def ghost_commands() -> dict[str, type[Command]]:
    return {"agreement": Agreement}


@hookimpl
def ghost_policies() -> dict[str, type[Policy]]:
    return {"above_median": AboveMedian}
