"""Makes the engines that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, Engine
from ghost_core.plugins import installed
from ghost_engines.directions import Closure
from ghost_engines.dot_product import DotProductEngine
from ghost_engines.runs.config import DOTS, RunConfig
from ghost_engines.scoring import ScoringEngine
from ghost_engines.values import InRunValues

GivenDirections = Mapping[str, Closure | Mapping[str, Tensor]]
Engines = dict[str, Engine[Any]]


def make_engines(
    config: RunConfig, model: nn.Module, scaler: torch.amp.GradScaler | None
) -> Engines:
    """Return the engines of a config by name.

    Raises:
        UnknownNameError: If an option does not exist.
        CaptureError: If an option does not fit.
    """
    engines: Engines = {}
    for name in config.engines:
        options = _given(config, name)
        if scaler is not None:
            options["grad_scaler"] = scaler
        kind: Any = installed().engine(name)
        engines[name] = kind(model, **options)
    return engines


def _given(config: RunConfig, name: str) -> dict[str, Any]:
    """Return the options of one engine that a config gives."""
    mode = {"mode": config.mode} if name == DOTS else {}
    return {**config.options.get(name, {}), **mode}


def effective_options(config: RunConfig, engines: Engines) -> dict[str, dict[str, Any]]:
    """Return all options of each engine, defaults included, but for the model and the scaler."""
    return {
        name: {
            option: value
            for option, value in (_defaults(engine) | _given(config, name)).items()
            if value is not Parameter.empty and option != "grad_scaler"
        }
        for name, engine in engines.items()
    }


def _defaults(engine: object) -> dict[str, Any]:
    """Return none for what is no `Engine`, and does not tell its options."""
    return type(engine).options() if isinstance(engine, Engine) else {}


def scorer_of(engines: Engines) -> ScoringEngine[Any] | None:
    """Return the first engine that scores batches."""
    found = (each for each in engines.values() if isinstance(each, ScoringEngine))
    return next(found, None)


def joining(scorer: ScoringEngine[Any] | None, config: RunConfig) -> DotProductEngine | None:
    """Return the engine whose batches have validation samples in them, in mode "concatenated"."""
    joins = isinstance(scorer, DotProductEngine) and config.mode == "concatenated"
    return scorer if joins else None  # type: ignore[return-value]


def values_of(
    stack: ExitStack,
    scorer: ScoringEngine[Any],
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
) -> InRunValues:
    """Return what adds up values, as a config says, for a stack to leave."""
    made: list[InRunValues] = []

    def leave(*exception: Any) -> None:
        for values in made:
            values.__exit__(*exception)

    # Before there are any, since they watch the optimizer from there on; twice, as `undo` does.
    stack.push(leave)
    stack.push(leave)
    order: Any = config.order  # 1 or 2: checked by the config
    made.append(InRunValues(scorer, optimizer, order=order, history=config.history))
    return made[0]


def add_directions(engines: Engines, directions: GivenDirections, config: RunConfig) -> None:
    """Give the directions to all engines that score.

    Raises:
        CaptureError: If there are none for an engine that needs some, or no engine for them, or one
            is none.
    """
    scoring = [each for each in engines.values() if isinstance(each, ScoringEngine)]
    if directions and engines and not scoring:
        raise CaptureError(
            f"directions are given, and none of {', '.join(engines)} scores",
            remedy=f"leave them out, or add {DOTS} to the methods",
        )
    for engine in scoring:
        for name, direction in directions.items():
            changes = callable(direction)  # tensors stay as they are
            engine.add_direction(name, direction, refresh=config.refresh if changes else None)
        if not engine.directions:
            raise CaptureError(
                f"{type(engine).__name__} has nothing to score samples against",
                remedy="name validation losses: Run(..., directions={'val': val_loss})",
            )
