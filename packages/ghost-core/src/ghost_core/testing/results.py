"""Compares the results of an engine with what gradients by autograd say they should be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import Engine
from ghost_core.testing.examples import Inputs, LayerExample, N, indices
from ghost_core.testing.feeds import Joined, join
from ghost_core.testing.oracle import assert_within
from ghost_core.testing.tiny import TinyTransformer
from ghost_core.testing.trials import Trial

EngineFactory = Callable[..., Engine[Any]]
"""Makes an engine for a model, with options that all engines take by keyword."""

Expected = Callable[[Mapping[str, Tensor]], Tensor]
"""Computes a result from the gradients, float64 `[N, *shape]`, by first name of the parameter."""

ExpectedOfBoth = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""Computes a result from the gradients of training samples, and those of validation samples."""

SCALE = 8.0
"""What a gradient scaler multiplies the loss with."""


def check_results(
    make_engine: EngineFactory,
    expected: Expected | ExpectedOfBoth,
    values: Callable[[Any], Tensor] | None,
    examples: Mapping[str, LayerExample],
    tolerance: float,
    concatenated: bool = False,
) -> None:
    """Assert that an engine's results are those expected, for examples and in many ways of use.

    Args:
        make_engine: Makes the engine.
        expected: Computes the result.
        values: Picks from the engine's result what `expected` computes; by default all of it.
        examples: What it is run on, beside a `TinyTransformer`; those to be refused are left out.
        tolerance: Error allowed relative to the largest number of the result.
        concatenated: Whether the last samples of a batch are of validation.

    Raises:
        AssertionError: Naming example, way of use, worst entry, error and bound; or that all that
            was expected is zero.
        ValueError: If a result is no tensor and `values` is not given.
    """
    exact = [example for example in examples.values() if example.refusal is None]
    ways = [*map(_Way, exact), *_ways()]
    if concatenated:  # one sample has to be of validation
        ways = [*(_JoinedWay(each) for each in exact if each.n > 1), *_joined_ways()]
    anything = False
    for way in ways:
        result, gradients = way.run(make_engine)
        wanted, found = expected(*gradients), _picked(result, values)
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        anything = anything or largest > 0
        assert_within(found, wanted, largest, tolerance, way.what)
    if not anything:
        raise AssertionError("what is expected is zero in all examples, so nothing would be tested")


@dataclass(frozen=True)
class _Way:
    """How an engine is used on an example.

    Attributes:
        example: The example.
        label: What is special, for messages.
        micro: Whether the samples come in two micro-batches.
        passes: How many passes there are of the same samples, on other inputs.
        scaled: Whether a gradient scaler multiplies the loss.
        frozen: Whether it is a frozen pass.
        layers: Names of the parameters selected; all if there are none.
    """

    example: LayerExample
    label: str = ""
    micro: bool = False
    passes: int = 1
    scaled: bool = False
    frozen: bool = False
    layers: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """The example and the way, for messages."""
        return f"{self.example.name}, {self.label}" if self.label else self.example.name

    def run(self, make_engine: EngineFactory) -> tuple[Any, Sequence[dict[str, Tensor]]]:
        """Return an engine's result and the gradients by autograd, which it is to be made of."""
        trial, n = Trial(self.example), self.example.n
        module, options = trial.module(), dict(self.example.options)
        before = copy.deepcopy(module)
        if self.layers:
            options["layers"] = list(self.layers)
        if (scaler := self._scaler()) is not None:
            options["grad_scaler"] = scaler
        engine = make_engine(module, **options)
        batches = list(self._inputs(n))
        with engine.frozen() if self.frozen else engine, engine.batch(range(n)) as batch:
            for inputs in batches:
                loss = trial.losses(module, inputs).sum()
                (loss if scaler is None else scaler.scale(loss)).backward()
        return batch.result, [self._gradients(trial, before, batches)]

    def _scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler("cpu", init_scale=SCALE) if self.scaled else None

    def _inputs(self, n: int) -> Iterator[Inputs]:
        """Yield the inputs of each pass."""
        for seed in range(self.passes):
            drawn = self.example.draw(n, seed=seed)
            if not self.micro:
                yield drawn
                continue
            for samples in (slice(0, 1), slice(1, n)):
                args = tuple(value[samples] for value in drawn.args)
                yield Inputs(args, {}, len(range(n)[samples]))

    def _gradients(
        self, trial: Trial, before: nn.Module, batches: list[Inputs]
    ) -> dict[str, Tensor]:
        """Return the gradients that all passes give the samples."""
        found = [trial.expected(before, inputs) for inputs in batches]
        names = self.layers or tuple(found[0])
        together: Callable[[list[Tensor]], Tensor] = torch.cat if self.micro else _total
        return {name: together([each[name] for each in found]) for name in names}


@dataclass(frozen=True)
class _JoinedWay(_Way):
    """How an engine is used on an example whose last samples are of validation.

    Attributes:
        validation: How many.
    """

    validation: int = 1

    def run(self, make_engine: EngineFactory) -> tuple[Any, Sequence[dict[str, Tensor]]]:
        """Return an engine's result, and the gradients of both by autograd, times their weights."""
        trial, inputs = Trial(self.example), self.example.draw()
        module, options = trial.module(), dict(self.example.options)
        if (scaler := self._scaler()) is not None:
            options["grad_scaler"] = scaler
        engine = make_engine(module, **options)
        gradients = trial.expected(copy.deepcopy(module), inputs)
        feed, n = Joined(self.validation), inputs.n - self.validation
        dim = engine.tracking.batch_dim
        train, others = (torch.zeros(*(1,) * dim, size) for size in (n, self.validation))
        with engine.frozen() if self.frozen else engine:
            # The inputs are joined already: the engine learns how many samples are of which kind.
            join(engine, train, others, dim)
            with engine.batch(range(n)) as batch:
                feed.backward(engine, trial.losses(module, inputs))
        weight = feed.validation_weight
        return batch.result, [
            {name: each[:n] for name, each in gradients.items()},
            {name: weight * each[n:] for name, each in gradients.items()},
        ]


def _joined_ways() -> Iterator[_JoinedWay]:
    """Yield the ways to use an engine whose batches are joined."""
    yield _JoinedWay(_transformer(), "with one validation sample")
    yield _JoinedWay(_transformer(), "with two validation samples", validation=2)
    yield _JoinedWay(_transformer(), "with a gradient scaler", scaled=True, validation=2)
    yield _JoinedWay(_transformer(), "in a frozen() pass", frozen=True, validation=2)


def _transformer() -> LayerExample:
    return LayerExample("tiny transformer", lambda: TinyTransformer().eval(), (indices(N, 6),))


def _ways() -> Iterator[_Way]:
    """Yield the ways to use an engine, on a model with a tied head and shared positions."""
    model = _transformer()
    chosen = ("tokens.weight", "attend.bias")
    yield _Way(model, "in one pass")
    yield _Way(model, "in micro-batches", micro=True)
    yield _Way(model, "in two passes of all samples", passes=2)
    yield _Way(model, "with a gradient scaler", scaled=True)
    yield _Way(model, "in a frozen() pass", frozen=True)
    yield _Way(model, f"with layers={list(chosen)}", layers=chosen)


def _picked(result: Any, values: Callable[[Any], Tensor] | None) -> Tensor:
    picked = result if values is None else values(result)
    if not isinstance(picked, Tensor):
        raise ValueError(
            f"the result is {type(result).__name__}, not a tensor: say what of it is expected with "
            "check_engine(values=...)"
        )
    return picked


def _total(gradients: list[Tensor]) -> Tensor:
    return torch.stack(gradients).sum(0)
