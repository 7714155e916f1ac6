"""Compares ghost's gradients with one autograd call per sample, on the user's own batch.

The verification of the split looks at which rows a gradient reaches. It cannot see a loss that
couples samples, or a sampler with a wrong formula; this looks at values and can.

1. Without ghost, the losses `[N]` are computed, and autograd is asked for the gradient of some of
   them, one call each.
2. They are computed again in a batch of ghost's, and `Σ_n w_n losses[n]` is backpropagated. What
   arrives for row n is to be `w_n` times the gradient of `losses[n]`.

The weights differ, so that identical samples that share a loss or exchange rows are found as well.
They are powers of two, which scale numbers without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Unpack

import torch
from torch import Tensor, nn

from ghost_core.algebra import PRECISIONS, PerSampleGradient, Record, chunks, floating_dtypes
from ghost_core.batch import Batch
from ghost_core.capture import Pass, Recorder
from ghost_core.compare.casts import CastMode
from ghost_core.compare.report import Remainder, Verification, check_parameters
from ghost_core.engine import Engine, EngineOptions
from ghost_core.errors import CaptureError
from ghost_core.state import untouched
from ghost_core.tracking import Site

Losses = Callable[[], Tensor]
"""Runs the model on a batch and returns one loss per sample, floating `[N]`; the same each time."""


_ELEMENTS = 2**28  # 2 GiB of float64


def compare(
    model: nn.Module,
    losses: Losses,
    *,
    samples: int = 8,
    tolerance: float | None = None,
    owners: Mapping[str, Tensor] = MappingProxyType({}),
    progress: Callable[[int], object] | None = None,
    **options: Unpack[EngineOptions],
) -> Verification:
    """Compare ghost's gradients of some samples with one autograd call per sample.

    `losses` is called a few times, always with the same random numbers and buffers. `.grad`,
    random number generators, buffers, modes, `requires_grad` and hooks are as found afterwards.
    Parameters are frozen in ghost's own pass, so that no hook on their gradients runs, unless an
    engine is attached for training. One graph and the gradients of a few samples are held at a
    time: of as many as fit into 2 GiB of float64, or of one.

    Args:
        model: The module that `losses` calls.
        losses: Runs the model on a batch and returns one loss per sample, floating `[N]`.
        samples: How many samples to compare, spread over the batch, first and last included.
        tolerance: Error allowed, between 0 and 1; by default that of `PRECISIONS`.
        owners: Tensors that the option `row_owner` names, as `Engine.batch` takes them.
        progress: Called with 1 after each sample.
        options: What to track, and how; see `Engine`. With `verify=False`, samples that mix are
            not refused but found in the values.

    Returns:
        The errors by parameter.

    Raises:
        CaptureError: If an option does not fit, a batch is open, or the losses are not `[N]`,
            finite, dependent on the tracked parameters, and the same each time.
        WrongSplitError: If the split by sample is refused.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
    """
    if not callable(losses):
        raise CaptureError(
            f"verify() takes a function that computes the losses, not a {type(losses).__name__}: "
            "engine.verify(lambda: per_sample_loss(model, batch))"
        )
    if tolerance is not None and not 0 < tolerance < 1:
        raise CaptureError(f"tolerance must be between 0 and 1, not {tolerance}")
    engine = _Receiver(model, **options)
    engine.owners = owners
    parameters = {site.parameter: model.get_parameter(site.parameter) for site in engine.sites}
    with _attached(engine):
        casts = CastMode(parameters)
        with engine.paused(), untouched(model), torch.enable_grad(), casts:
            expected = check_losses(losses()).detach()
        engine.dtypes = casts.dtypes
        n = len(expected)
        rows = choose_samples(n, samples)
        weights = _weights(n)
        verified, remainders = True, []
        for part in chunks(len(rows), sum(map(Tensor.numel, parameters.values())), _ELEMENTS):
            with engine.paused(), untouched(model), torch.enable_grad():
                values = check_losses(losses(), expected)
                remainder = Remainder.of(values, parameters, rows[part], progress)
                del values  # and the graph with it
            engine.receive = partial(_subtract, remainder, weights)
            verified &= _backpropagate(engine, losses, expected, weights)
            remainders.append(remainder)
        modules = engine.tracking.modules
        checks = check_parameters(remainders, modules, engine.dtypes, tolerance)
        found = Verification(n, rows, checks, verified)
        if found.ok:
            return found
        return replace(found, reason=_reason(engine, losses, expected, found))


def choose_samples(n: int, samples: int) -> tuple[int, ...]:
    """Return rows of some of N samples, spread evenly, first and last included.

    Raises:
        CaptureError: If `samples` is not positive.
    """
    if samples < 1:
        raise CaptureError(f"samples must be at least 1, not {samples}")
    count = min(samples, n)
    return tuple(round(at * (n - 1) / max(count - 1, 1)) for at in range(count))


def check_losses(losses: object, expected: Tensor | None = None) -> Tensor:
    """Return losses after looking at them.

    Args:
        losses: What a function of the user's returned.
        expected: What it returned before.

    Raises:
        CaptureError: If it is not a differentiable floating tensor `[N]` of finite numbers, or not
            as before.
    """
    remedy = "return one loss per sample, a floating tensor [N] that depends on the parameters"
    if not isinstance(losses, Tensor):
        raise CaptureError(f"losses are a {type(losses).__name__}: {remedy}")
    if losses.dim() != 1 or not len(losses) or not losses.is_floating_point():
        kind = f"{str(losses.dtype).removeprefix('torch.')} of shape {tuple(losses.shape)}"
        raise CaptureError(f"losses are {kind}: {remedy}")
    if not losses.requires_grad:
        raise CaptureError(f"losses do not depend on any trainable parameter: {remedy}")
    if wrong := (~losses.isfinite()).nonzero().flatten().tolist():
        raise CaptureError(f"the loss of sample {wrong[0]} is not finite: {losses[wrong[0]]}")
    if expected is not None:
        allowed = PRECISIONS.get(losses.dtype, PRECISIONS[torch.float32]).tolerance
        if losses.shape != expected.shape or (
            (losses.detach() - expected).abs().max() > allowed * expected.abs().max()
        ):
            raise CaptureError(
                "losses are others each time they are computed: take one fixed batch, and no "
                "random numbers but those of torch, numpy and random"
            )
    return losses


class _Receiver(Engine[None]):
    """Hands on what arrives.

    Attributes:
        owners: What its batches are opened with.
        receive: Takes what arrives.
        dtypes: Floating dtypes that were seen of casts, inputs and gradients, by parameter.
    """

    balanced = False
    owners: Mapping[str, Tensor]
    receive: Callable[[Pass, Site, PerSampleGradient], None]
    dtypes: dict[str, set[torch.dtype]]

    def on_input(self, site: Site, record: Record) -> Record:
        self.dtypes[site.parameter].update(floating_dtypes(record))
        return record

    def on_gradient(self, pass_: Pass, site: Site, gradient: PerSampleGradient) -> None:
        self.dtypes[site.parameter].update(floating_dtypes(gradient))
        self.receive(pass_, site, gradient)

    def on_end(self, batch: Batch[None]) -> None:
        return None


def _attached(engine: _Receiver) -> AbstractContextManager[object]:
    """Attach an engine without weight gradients, or as others are that are attached for training.

    Raises:
        CaptureError: If hooks on parameters would change gradients, or run on those made here.
    """
    recorder = Recorder.of(engine.model)
    training = recorder.attached and not recorder.flags
    for name, parameter in engine.model.named_parameters():
        if training and parameter._post_accumulate_grad_hooks:
            raise CaptureError(
                f"{name} has a hook that runs when its gradient is there, and would run on those "
                "of the comparison: compare before an engine is attached"
            )
    for site in engine.sites:
        if engine.model.get_parameter(site.parameter)._backward_hooks:
            raise CaptureError(
                f"{site.parameter} has a hook on its gradient, which contributions do not pass "
                "through: remove the hook, or leave the parameter out with exclude=..."
            )
    return engine if training else engine.frozen()


def _backpropagate(engine: _Receiver, losses: Losses, expected: Tensor, weights: Tensor) -> bool:
    """Backpropagate weighted losses in a batch, and return whether it is verified."""
    with (
        untouched(engine.model),
        torch.enable_grad(),
        engine.batch(range(len(expected)), owners=engine.owners) as batch,
    ):
        values = check_losses(losses(), expected)
        (values * weights.to(values)).sum().backward()
    return batch.verified


def _reason(engine: _Receiver, losses: Losses, expected: Tensor, found: Verification) -> str:
    """Find out why gradients are wrong: see which rows one sample's loss reaches, and who its row.

    Args:
        engine: The engine, attached.
        losses: Computes the losses.
        expected: What it returned before.
        found: What is wrong.
    """
    row = found.wrong[0].sample
    alone = torch.zeros(len(expected))
    alone[row] = 1
    reached = _rows_reached(engine, losses, expected, alone)
    reached_by_others = _rows_reached(engine, losses, expected, 1 - alone)
    others = {name: rows - {row} for name, rows in reached.items() if rows - {row}}
    met = {name for name, rows in reached_by_others.items() if row in rows}
    mixed = {name: None for name in reached if name in others or name in met}
    if mixed.keys().isdisjoint(check.parameter for check in found.wrong):
        samplers = ", ".join(dict.fromkeys(check.sampler for check in found.wrong))
        if all(check.error < 1e-5 for check in found.wrong):
            return (
                "Reason: errors this small are rounding, if these modules compute in float32 "
                f"whatever the dtype of their parameters is; else {samplers} is slightly off.\n"
                "Remedy: find out which; for rounding, allow for it with tolerance=1e-4."
            )
        return (
            f"Reason: the loss of sample {row} reaches its own row only, and no other loss does. "
            f"So these modules compute another function than {samplers} takes them for, or their "
            "parameters are used outside of them as well.\n"
            "Remedy: leave them out with exclude=..., or mend the sampler."
        )
    where = next(iter(mixed))
    how = (
        f"the loss of sample {row} reaches the rows of {_first(others[where])}"
        if where in others
        else f"the losses of other samples reach the row of sample {row}"
    )
    if all(name in mixed for name, rows in (reached | reached_by_others).items() if rows):
        return (
            f"Reason: {how}, at every module. The losses depend on each other, as contrastive ones "
            "and those normalised over the batch do, or something behind all of these modules "
            "mixes samples.\n"
            "Remedy: give losses that depend on one sample each. What a loss over the batch "
            "backpropagates is split by row of the model's output; these parts are exact, but not "
            "the gradient of any one loss."
        )
    return (
        f"Reason: {how}, at {where} and not everywhere. Something behind it mixes samples, as "
        "BatchNorm does in training, or its sampler takes another axis for the samples.\n"
        "Remedy: leave such modules out with exclude=..., or put them into evaluation mode."
    )


def _rows_reached(
    engine: _Receiver, losses: Losses, expected: Tensor, weights: Tensor
) -> dict[str, set[int]]:
    """Backpropagate weighted losses, and return the rows with a gradient by parameter."""
    reached: dict[str, set[int]] = {}

    def look(pass_: Pass, site: Site, gradient: PerSampleGradient) -> None:
        rows = (gradient.paired(gradient) != 0).nonzero().flatten() + pass_.start
        reached.setdefault(site.parameter, set()).update(rows.tolist())

    engine.receive = look
    _backpropagate(engine, losses, expected, weights)
    return reached


def _first(rows: set[int]) -> str:
    shown = ", ".join(map(str, sorted(rows)[:6]))
    return f"{shown}, ..." if len(rows) > 6 else shown


def _subtract(
    remainder: Remainder, weights: Tensor, pass_: Pass, site: Site, gradient: PerSampleGradient
) -> None:
    remainder.subtract(site.parameter, pass_.start, gradient, weights)


def _weights(n: int) -> Tensor:
    """Draw a weight for each loss: powers of two, from no global random number generator."""
    generator = torch.Generator().manual_seed(0)
    return 2.0 ** torch.randint(-2, 2, (n,), generator=generator)
