"""What samplers promise beside their numbers: what they keep, and which calls they can take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghost_core import Call, GradientSampler, InputFactor, Record
from ghost_core.testing.comparisons import captured, check_materialized
from ghost_core.testing.holder import GradientHolder
from ghost_core.testing.losses import is_floating
from ghost_core.testing.repeated import repeated, transformed
from ghost_core.testing.snapshots import tensors_in
from ghost_core.testing.trials import Trial
from ghost_core.tracking import Claim, SamplerRegistry, dotted_name

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs."""


def check_promises(trial: Trial, module: nn.Module, given: Given, tolerance: float) -> None:
    """Assert what a sampler promises beside the numbers for the inputs given.

    Args:
        trial: How the layer is run, once.
        module: The layer.
        given: Its inputs.
        tolerance: Error allowed, relative to the norms of gradients.

    Raises:
        AssertionError: Naming what is broken.
    """
    _check_static(trial, module, given)
    _check_autocast(trial, module)
    _check_keywords(trial, module, given, tolerance)
    _check_several_tokens(trial, module, given, tolerance)


def _check_static(trial: Trial, module: nn.Module, given: Given) -> None:
    """Assert that no tensor that depends on the inputs is kept outside of records.

    Autograd would neither own it nor see it changed in place, and engines could not compress it.
    """
    n = trial.example.n
    other = repeated(module, transformed(given, 5), n, uses=1)
    kept = [_static(replace(trial, example=each), module) for each in (trial.example, other)]
    same = len(kept[0]) == len(kept[1]) and all(map(_equal, *kept))
    if not same:
        raise AssertionError(
            f"{trial.blamed} keeps tensors of a call of {trial.example.name} in static: autograd "
            "owns what is in records, so put them there"
        )


def _static(trial: Trial, module: nn.Module) -> list[Tensor]:
    """Return the tensors in what a sampler keeps as `static`."""
    found: list[Tensor] = []

    def see(call: Call, records: Mapping[str, Record]) -> None:
        found.extend(tensor.detach().clone() for tensor in tensors_in(call.static))

    _run(trial, module, see)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _check_autocast(trial: Trial, module: nn.Module) -> None:
    """Assert that inputs are kept as the kernel saw them, in the dtype of the output."""
    cast = replace(trial, dtype=torch.float32, autocast=True)

    def see(call: Call, records: Mapping[str, Record]) -> None:
        narrow = call.outputs[0].dtype
        for local, record in records.items():
            kept = record.tensors().values() if isinstance(record, InputFactor) else ()
            for tensor in filter(is_floating, kept):
                if tensor.dtype.itemsize > narrow.itemsize:
                    raise AssertionError(
                        f"{trial.blamed} keeps {str(tensor.dtype).removeprefix('torch.')} of "
                        f"{trial.example.name} under bfloat16 autocast for {local}, where the "
                        f"output is {narrow}: keep what the kernel saw"
                    )

    if cast.runs(trial.example.n):
        _run(cast, module, see)


def _check_keywords(trial: Trial, module: nn.Module, given: Given, tolerance: float) -> None:
    """Compare gradients of a call with every input by keyword."""
    args, kwargs = given
    named = list(inspect.signature(module.forward).parameters.values())[: len(args)]
    if not args or any(each.kind is not each.POSITIONAL_OR_KEYWORD for each in named):
        return
    names = (each.name for each in named)
    by_keyword = (), dict(zip(names, args, strict=True)) | kwargs
    example = repeated(module, by_keyword, trial.example.n, uses=1)
    _check_again(replace(trial, example=example, label="with inputs by keyword"), tolerance)


def _check_several_tokens(trial: Trial, module: nn.Module, given: Given, tolerance: float) -> None:
    """Compare gradients of inputs with another axis, where those given have one token a sample."""
    n = trial.example.n
    alone = captured(trial, n)
    if any(_tokens(use) > 1 for gradients in alone.values() for use in gradients.uses):
        return
    sizes = {size for leaf in tensors_in(given) for size in leaf.shape}
    count = next(each for each in range(3, 100) if each not in sizes)
    several = tree_map(lambda leaf: _several(leaf, n, count), given)
    example = repeated(module, several, n, uses=1)
    _check_again(replace(trial, example=example, label="with several tokens"), tolerance)


def _tokens(gradient: Any) -> int:
    direction = torch.zeros(1, *gradient.shape, dtype=torch.float64)
    with torch.no_grad():
        return int(gradient.token_dot(direction).shape[1])


def _several(value: Any, n: int, count: int) -> Any:
    """Put different tokens side by side on a second axis."""
    if not isinstance(value, Tensor) or not value.dim() or len(value) != n:
        return value
    if is_floating(value):
        return torch.stack([transformed(value, use) for use in range(count)], dim=1)
    return torch.stack([value.roll(use, 0) for use in range(count)], dim=1)


def _check_again(trial: Trial, tolerance: float) -> None:
    if trial.runs(trial.example.n):
        check_materialized(trial, trial.example.n, tolerance)


def _run(
    trial: Trial, module: nn.Module, see: Callable[[Call, Mapping[str, Record]], None]
) -> None:
    """Run a trial with somebody looking at what the sampler records."""
    assert trial.registry is not None
    (claim,) = trial.registry.claims
    watched = Claim(dotted_name(type(module)), _observed(claim.sampler, see), claim.plugin)
    trial = replace(trial, registry=SamplerRegistry([watched]))
    with trial.engine(GradientHolder, verify=False) as engine:
        trial.hold(engine, trial.inputs(trial.example.n))


def _observed(
    kind: type[GradientSampler], see: Callable[[Call, Mapping[str, Record]], None]
) -> type[GradientSampler]:
    """Return a sampler that shows what it records."""

    def record(self: GradientSampler, call: Call) -> Mapping[str, Record]:
        records = kind.record(self, call)
        see(call, records)
        return records

    return type(kind.__name__, (kind,), {"record": record})
