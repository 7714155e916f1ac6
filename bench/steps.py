"""Steps that cases are made of: plain ones, scored ones, and first batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Setting, Way
from ghost_core import Batch, Engine, Pass, PerSampleGradient, TrackedParameter
from ghost_engines import DotProductEngine, ProjectionEngine

Loss = Callable[[nn.Module], Tensor]
"""Returns the loss of a batch for a model."""


def plain(model: nn.Module, loss: Loss) -> Way:
    """Return a forward and a backward pass without ghost, on a copy of a model."""
    model = copy.deepcopy(model)
    return Way(lambda: loss(model).backward(), model.zero_grad)


def scored(setting: Setting, model: nn.Module, loss: Loss, n: int, **options: Any) -> Way:
    """Return a step of N samples, scored with a direction that is there; not the first one."""
    model = copy.deepcopy(model)
    engine = DotProductEngine(model, **options)
    engine.add_direction("random", directions(model))
    setting.stack.enter_context(engine)

    def run() -> None:
        with engine.batch(range(n)):
            loss(model).backward()

    return Way(run, model.zero_grad)


class Unscored(Engine[None]):
    """Asks for no number of any gradient."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Let it be."""

    def on_end(self, batch: Batch[None]) -> None:
        """Have no result."""


def unscored(setting: Setting, model: nn.Module, loss: Loss, n: int) -> Way:
    """Return a step of N samples whose gradients are found, and compared, and no more."""
    model = copy.deepcopy(model)
    engine = setting.stack.enter_context(Unscored(model))

    def run() -> None:
        with engine.batch(range(n)):
            loss(model).backward()

    return Way(run, model.zero_grad)


def first_scored(model: nn.Module, loss: Loss, n: int, **options: Any) -> Way:
    """Return the first step of an engine, attached to a model it has not seen."""
    waiting: list[tuple[nn.Module, DotProductEngine]] = []

    def before() -> None:
        fresh = copy.deepcopy(model)
        engine = DotProductEngine(fresh, **options)
        engine.add_direction("random", directions(fresh))
        waiting.append((fresh, engine))

    def run() -> None:
        fresh, engine = waiting.pop()
        with engine, engine.batch(range(n)):
            loss(fresh).backward()

    return Way(run, before)


def projected(
    setting: Setting, model: nn.Module, loss: Loss, n: int, *, frozen: bool, **options: Any
) -> Way:
    """Return a step of N samples whose gradients are projected; not the first one.

    Args:
        setting: Where it runs.
        model: The model; it is copied.
        loss: The loss of a batch.
        n: Number of samples N.
        frozen: Whether weight gradients are left out, as where a corpus is gone through once.
        options: Those of the engine; without any, rows have 256 numbers for each parameter.
    """
    model = copy.deepcopy(model)
    engine = ProjectionEngine(model, **(options or {"dim": 256}))
    setting.stack.enter_context(engine.frozen() if frozen else engine)

    def run() -> None:
        with engine.batch(range(n)):
            loss(model).backward()
        engine.collect()

    return Way(run, model.zero_grad)


def directions(model: nn.Module) -> Mapping[str, Tensor]:
    """Return random numbers in place of a validation gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.randn_like(p) for name, p in trained.items()}
