"""The conformance test of engines compares numbers, and sees each way to get them wrong."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from ghost_core import Batch, Engine, Pass, PerSampleGradient, TrackedParameter
from ghost_core.testing import LAYERS, check_engine, plain_registry

NAMES = ("linear, no bias", "linear, tokens", "linear, used twice", "embedding tied to a head")
EXAMPLES = {name: LAYERS[name] for name in NAMES}


class SquaredNorms(Engine[Tensor]):
    """Squared norms of the gradients of all parameters, `[N]`."""

    def on_start(self, batch: Batch[Tensor]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._n = batch.n

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        rows = gradient.materialize().reshape(gradient.n, parameter.shape.numel()).double()
        self.add(parameter, pass_, rows / self.loss_scale)

    def add(self, parameter: TrackedParameter, pass_: Pass, rows: Tensor) -> None:
        empty = rows.new_zeros(self._n, rows.shape[1])
        self._sums.setdefault(parameter.name, empty)[pass_.samples] += rows

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        found = [rows.square().sum(1) for rows in self._sums.values()]
        return torch.stack(found).sum(0) if found else torch.zeros(batch.n, dtype=torch.float64)


def squared_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(
        [rows.reshape(len(rows), -1).square().sum(1) for rows in gradients.values()]
    ).sum(0)


class UseByUse(SquaredNorms):
    """Squares the uses of a parameter one by one."""

    def add(self, parameter: TrackedParameter, pass_: Pass, rows: Tensor) -> None:
        self._sums[f"{parameter.name} {len(self._sums)}"] = whole = rows.new_zeros(
            self._n, rows.shape[1]
        )
        whole[pass_.samples] = rows


class LastUse(SquaredNorms):
    """Keeps the last use of a parameter."""

    def add(self, parameter: TrackedParameter, pass_: Pass, rows: Tensor) -> None:
        whole = self._sums.setdefault(parameter.name, rows.new_zeros(self._n, rows.shape[1]))
        whole[pass_.samples] = rows


class FirstRows(SquaredNorms):
    """Takes every pass for one of the first samples."""

    def add(self, parameter: TrackedParameter, pass_: Pass, rows: Tensor) -> None:
        empty = rows.new_zeros(self._n, rows.shape[1])
        self._sums.setdefault(parameter.name, empty)[: len(rows)] += rows


class IgnoresScaler(SquaredNorms):
    """Leaves the scale of the loss in."""

    def on_start(self, batch: Batch[Tensor]) -> None:
        super().on_start(batch)
        self.loss_scale = 1.0


class TakesWhatThereIs(SquaredNorms):
    """Takes the gradients of all parameters, whatever is selected."""

    def __init__(self, model: nn.Module, *, layers: object = "*", **options: object) -> None:
        super().__init__(model, **options)


class NoBias(SquaredNorms):
    """Forgets biases."""

    def add(self, parameter: TrackedParameter, pass_: Pass, rows: Tensor) -> None:
        super().add(parameter, pass_, rows * (not parameter.name.endswith("bias")))


class WrongWhenFrozen(SquaredNorms):
    """Takes the gradients that autograd makes, of which there are none in a frozen pass."""

    @contextmanager
    def frozen(self):
        self.is_frozen = True
        with super().frozen():
            yield self
        del self.is_frozen

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        return super().on_end(batch) * (not hasattr(self, "is_frozen"))


class Swapped(SquaredNorms):
    """Gives each sample's number to another."""

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        return super().on_end(batch).flip(0)


def check(kind: type[Engine[Tensor]], **options: object) -> None:
    def make(model: nn.Module, **given: object) -> Engine[Tensor]:
        return kind(model, registry=plain_registry(), **given)

    given = {"expected": squared_norms, "examples": EXAMPLES} | options
    check_engine(make, steps=2, **given)


def test_an_engine_without_faults_passes() -> None:
    check(SquaredNorms)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (UseByUse, r"linear, used twice: .* entries are off"),
        (LastUse, r"linear, used twice: .* entries are off"),
        (FirstRows, r"in micro-batches: .* entries are off"),
        (IgnoresScaler, r"with a gradient scaler: .* entries are off"),
        (TakesWhatThereIs, r"with layers=\[.*\]: .* entries are off"),
        (NoBias, r"linear, tokens: .* entries are off"),
        (WrongWhenFrozen, r"in a frozen\(\) pass: .* entries are off"),
        (Swapped, r"entries are off"),
    ],
)
def test_a_wrong_number_is_found(kind: type[Engine[Tensor]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(kind)


def test_the_uses_of_tied_parameters_are_found_without_modules_used_twice() -> None:
    for examples in ({}, {"tied": LAYERS["embedding tied to a head"]}):
        with pytest.raises(AssertionError, match=r"(tied to a head|in one pass): .* are off"):
            check(UseByUse, examples=examples)


def test_a_result_is_picked_apart_by_the_caller() -> None:
    class Named(SquaredNorms):
        def on_end(self, batch: Batch[Tensor]) -> dict[str, Tensor]:
            return {"norms": super().on_end(batch)}

    check(Named, values=lambda result: result["norms"])
    with pytest.raises(ValueError, match=r"dict.*values="):
        check(Named)


def test_a_reference_that_is_always_zero_tests_nothing() -> None:
    class Zero(SquaredNorms):
        def on_end(self, batch: Batch[Tensor]) -> Tensor:
            return 0 * super().on_end(batch)

    with pytest.raises(AssertionError, match="zero in all examples"):
        check(Zero, expected=lambda gradients: 0 * squared_norms(gradients))
