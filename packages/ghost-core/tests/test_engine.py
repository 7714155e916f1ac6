"""What subclasses of Engine may do, and what batches are made of."""

from collections.abc import Callable
from typing import Unpack

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    CaptureError,
    Engine,
    EngineOptions,
    Freeze,
    Pass,
    PerSampleGradient,
    TrackedParameter,
)
from ghost_core.batch import as_ids
from ghost_core.testing import GradientHolder
from ghost_core.testing.snapshots import assert_untouched, traces

N, D = 4, 3
Hold = Callable[..., GradientHolder]


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def test_a_failing_engine_leaves_no_trace(registry, model: nn.Module, x: Tensor) -> None:
    class Failing(GradientHolder):
        fails = ""

        def on_gradient(
            self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
        ) -> None:
            if self.fails == "gradient":
                raise KeyError
            super().on_gradient(pass_, parameter, gradient)

        def on_start(self, batch: Batch) -> None:
            super().on_start(batch)
            if self.fails == "start":
                raise KeyError

        def on_end(self, batch: Batch):
            if self.fails == "end":
                raise KeyError
            return super().on_end(batch)

    found, engine = traces(model), Failing(model, registry=registry)
    for where in ("gradient", "start", "end", ""):
        engine.fails = where
        with engine:
            if where:
                with pytest.raises(KeyError), engine.batch(range(N)):
                    loss(model(x)).backward()
            else:
                with engine.batch(range(N)) as batch:
                    loss(model(x)).backward()
        assert_untouched(found, model, f"after {where}")
    assert len(batch.result.uses["first.weight"]) == 1


class Nothing(Engine[None]):
    """Has no result."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Do nothing."""

    def on_end(self, batch: Batch[None]) -> None:
        """Return nothing."""


def test_an_engine_may_have_no_result(registry, model: nn.Module, x: Tensor) -> None:
    engine = Nothing(model, registry=registry)
    with engine, engine.batch(range(N)) as batch:
        loss(model(x)).backward()
    assert batch.result is None
    assert engine.freeze is Freeze.NEVER


def test_coverage_names_modules_samplers_and_parameters(hold: Hold, model: nn.Module) -> None:
    first, *rows = hold(model, exclude="*.bias").coverage().splitlines()
    assert first.split() == ["module", "class", "sampler", "parameters"]
    assert rows[0].split() == ["first", "Linear", "PlainLinear", "first.weight"]
    assert len(rows) == 2


@pytest.mark.parametrize(
    "ids", [range(3), [0, 1, 2], torch.arange(3), np.arange(3), np.arange(3, dtype=np.int32)]
)
def test_ids_are_integers_one_per_sample(ids) -> None:
    assert torch.equal(as_ids(ids), torch.arange(3))
    assert as_ids(ids).dtype == torch.int64


@pytest.mark.parametrize("ids", [[0.5], [[1]], "abc", [True], 3, None, torch.zeros(2), ["a"]])
def test_other_ids_are_an_error(ids) -> None:
    with pytest.raises(CaptureError, match="ids must be one integer per sample"):
        as_ids(ids)


def test_a_range_of_ids_is_on_the_cpu_whatever_device_is_set() -> None:
    with torch.device("meta"):
        ids = [
            as_ids(each) for each in (range(3), range(7, 1, -2), range(0), range(-1, 2**62, 2**61))
        ]
    assert all(each.dtype is torch.int64 for each in ids)
    assert [each.tolist() for each in ids] == [[0, 1, 2], [7, 5, 3], [], [-1, 2**61 - 1, 2**62 - 1]]


def test_ids_are_copied() -> None:
    ids = torch.arange(3)
    kept = as_ids(ids)
    ids[0] = 7
    assert kept[0] == 0


def test_an_unknown_option_lists_what_exists(registry) -> None:
    with pytest.raises(TypeError, match=r"did you mean 'exclude'.*Available: .*layers"):
        GradientHolder(nn.Linear(2, 2), registry=registry, exclud="a")


# What it says of itself


class WithOptions(Nothing):
    """Has an option of its own besides those of all engines."""

    def __init__(self, model: nn.Module, *, depth: int = 3, **options: Unpack[EngineOptions]):
        super().__init__(model, **options)


def test_an_engine_says_what_it_is(registry, model: nn.Module, x: Tensor) -> None:
    engine = WithOptions(model, depth=3, registry=registry)
    kind, n = type(model).__name__, len(engine.parameters)
    start = f"<WithOptions: {kind}, {n} parameters, registry="
    assert repr(engine).startswith(start)
    assert repr(engine).endswith(", detached>")
    with engine:
        assert repr(engine).endswith(", attached>")
        with engine.batch(range(N)):
            assert repr(engine).endswith(", open>")
            loss(model(x)).backward()
        assert repr(engine).endswith(", attached>")
    assert repr(engine).endswith(", detached>")


def test_an_engine_names_the_options_that_are_not_the_defaults(registry, model: nn.Module) -> None:
    engine = WithOptions(
        model, layers="first", exclude=(), batch_dim={}, verify=False, depth=4, registry=registry
    )
    assert f"{len(engine.parameters)} parameters, layers='first', verify=False, depth=4," in repr(
        engine
    )
    long = WithOptions(model, layers=["first"] * 9, registry=registry)
    assert "layers=['first', 'first', 'first', 'first', 'first', 'first', ...]" in repr(long)
