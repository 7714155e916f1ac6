"""The conformance test of engines that take validation samples in the batch, and its faults."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from ghost_core import Batch, Engine, Freeze, Pass, PerSampleGradient, TrackedParameter
from ghost_core.testing import LAYERS, VARIANTS, GradientHolder, check_engine, plain_registry

NAMES = (
    "linear, no bias", "linear, used twice", "embedding tied to a head",
    "sequence first, linear",
)  # fmt: skip
EXAMPLES = {name: LAYERS[name] for name in NAMES} | {"one sample": VARIANTS["linear, one sample"]}


class Joined(Engine[Tensor]):
    """Dots of training samples with the sum of the validation samples behind them, `[N]`."""

    freeze = Freeze.CALL
    scales = 2

    def concatenate(self, train: Tensor, validation: Tensor) -> Tensor:
        dim = self.tracking.batch_dim
        self._m = validation.shape[dim]
        return torch.cat([train, validation], dim)

    def backward(self, losses: Tensor, *, train_weight: float, validation_weight: float) -> None:
        n = len(losses) - self._m
        loss = train_weight * losses[:n].sum() + validation_weight * losses[n:].sum()
        (loss if self._grad_scaler is None else self._grad_scaler.scale(loss)).backward()

    def called_on(self, batch: Batch[Tensor]) -> int:
        return batch.n + self._m

    def on_start(self, batch: Batch[Tensor]) -> None:
        self._n = batch.n
        self._rows: dict[str, Tensor] = {}

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        rows = gradient.materialize()
        self.add(parameter.name, rows)
        return self.trained(rows) if self.makes_gradients else None

    def add(self, name: str, rows: Tensor) -> None:
        self._rows[name] = self._rows[name] + rows if name in self._rows else rows

    def trained(self, rows: Tensor) -> Tensor:
        return rows[: self._n].sum(0)

    def direction(self, rows: Tensor) -> Tensor:
        return rows[self._n :].sum(0)

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        dots = torch.zeros(batch.n, dtype=torch.float64)
        for rows in self._rows.values():
            own, direction = rows[: batch.n].flatten(1), self.direction(rows).flatten()
            dots += (own @ direction).double()
        return dots / self.loss_scale**self.scales

    def on_close(self) -> None:
        self._rows = {}


def dots(train: Mapping[str, Tensor], validation: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(
        [
            each.reshape(len(each), -1) @ validation[name].sum(0).flatten()
            for name, each in train.items()
        ]
    ).sum(0)


class InGrad(Joined):
    """Leaves the gradient of validation samples in `.grad`."""

    def trained(self, rows: Tensor) -> Tensor:
        return rows.sum(0)


class FirstOnly(Joined):
    """Is right for one validation sample only."""

    def direction(self, rows: Tensor) -> Tensor:
        return rows[self._n]


class OneRowOff(Joined):
    """Takes the last training sample for one of validation."""

    def direction(self, rows: Tensor) -> Tensor:
        return rows[self._n - 1 :].sum(0)


class UseByUse(Joined):
    """Multiplies each use with the direction of that use alone."""

    def add(self, name: str, rows: Tensor) -> None:
        self._rows[f"{name} {len(self._rows)}"] = rows


class ScaleForgotten(Joined):
    """Divides by the scale once, where both sides had it."""

    scales = 1


class TrainingLast(Joined):
    """Puts the validation samples in front."""

    def concatenate(self, train: Tensor, validation: Tensor) -> Tensor:
        super().concatenate(train, validation)
        return torch.cat([validation, train], self.tracking.batch_dim)


class Keeps(Joined):
    """Holds gradients for longer than a batch."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        self.kept = gradient
        return super().on_gradient(pass_, parameter, gradient)


def check(kind: type[Engine[Tensor]], **options: object) -> None:
    def make(model: nn.Module, **given: object) -> Engine[Tensor]:
        return kind(model, registry=plain_registry(), **given)

    given = {"expected": dots, "examples": EXAMPLES, "gradient_error": 1e-5, "steps": 2} | options
    check_engine(make, concatenated=True, **given)


def test_an_engine_without_faults_passes() -> None:
    check(Joined)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (InGrad, r"in float32, .*\.grad: .* entries are off|do not add up"),
        (FirstOnly, r"with two validation samples: .* entries are off"),
        (OneRowOff, r"linear, no bias: .* entries are off"),
        (UseByUse, r"linear, used twice: .* entries are off"),
        (ScaleForgotten, r"with a gradient scaler: .* entries are off"),
        (TrainingLast, "validation samples behind the others"),
        (Keeps, "captured tensors are alive"),
        (GradientHolder, r"GradientHolder has no method concatenate"),
    ],
)
def test_a_fault_is_found(kind: type[Engine[Tensor]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(kind)


def test_uses_of_tied_parameters_are_found_without_examples() -> None:
    with pytest.raises(AssertionError, match=r"tiny transformer, with one .* entries are off"):
        check(UseByUse, examples={})


def test_such_an_engine_makes_the_gradients() -> None:
    with pytest.raises(ValueError, match="gradient_error"):
        check(Joined, gradient_error=0.0)
