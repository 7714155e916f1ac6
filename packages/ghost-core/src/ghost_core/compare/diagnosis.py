"""Finds out why gradients differ from autograd's."""

from __future__ import annotations

import torch
from torch import Tensor

from ghost_core.algebra import INSIDE, PerSampleGradient
from ghost_core.capture import Pass
from ghost_core.compare.computation import Computation
from ghost_core.compare.report import Comparison
from ghost_core.tracking import TrackedParameter


def diagnose(computed: Computation, found: Comparison) -> tuple[str, str]:
    """Find out why gradients are wrong: see which rows one sample's loss reaches, and who its row.

    Args:
        computed: Computes the losses, attached.
        found: What is wrong.

    Returns:
        The reason, and the remedy.
    """
    row = found.wrong[0].sample
    alone = torch.zeros(found.n)
    alone[row] = 1
    reached = _samples_reached(computed, alone)
    reached_by_others = _samples_reached(computed, 1 - alone)
    others = {name: rows - {row} for name, rows in reached.items() if rows - {row}}
    met = {name for name, rows in reached_by_others.items() if row in rows}
    mixed = {name: None for name in reached if name in others or name in met}
    if mixed.keys().isdisjoint(check.parameter for check in found.wrong):
        return _wrong_numbers(found)
    where = next(iter(mixed))
    how = (
        f"the loss of sample {row} reaches the rows of {_first(others[where])}"
        if where in others
        else f"the losses of other samples reach the row of sample {row}"
    )
    if all(name in mixed for name, rows in (reached | reached_by_others).items() if rows):
        return (
            f"{how}, at every module. The losses depend on each other, as contrastive ones "
            "and those normalised over the batch do, or something behind all of these modules "
            "mixes samples",
            "give losses that depend on one sample each. What a loss over the batch "
            "backpropagates is split by row of the model's output; these parts are exact, but not "
            "the gradient of any one loss",
        )
    return (
        f"{how}, at {where} and not everywhere. Something behind it mixes samples, as "
        "BatchNorm does in training, or its sampler takes another axis for the samples",
        "leave such modules out with exclude=..., or put them into evaluation mode",
    )


def _wrong_numbers(found: Comparison) -> tuple[str, str]:
    """Return the reason and the remedy where no samples are mixed."""
    samplers = ", ".join(dict.fromkeys(check.sampler for check in found.wrong))
    if all(check.error < INSIDE for check in found.wrong):
        return (
            "errors this small are rounding, if these modules compute in float32 "
            f"whatever the dtype of their parameters is; else {samplers} is slightly off",
            "find out which; for rounding, allow for it with tolerance=1e-4",
        )
    return (
        f"the loss of sample {found.wrong[0].sample} reaches its own row only, and no other loss "
        f"does. So these modules compute another function than {samplers} takes them for, or their "
        "parameters are used outside of them as well",
        "leave them out with exclude=..., or mend the sampler",
    )


def _samples_reached(computed: Computation, weights: Tensor) -> dict[str, set[int]]:
    """Backpropagate weighted losses, and return the rows with a gradient by parameter."""
    reached: dict[str, set[int]] = {}

    def look(pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient) -> None:
        rows = (gradient.paired(gradient) != 0).nonzero().flatten() + pass_.start
        reached.setdefault(parameter.name, set()).update(rows.tolist())

    computed.backpropagate(weights, look)
    return reached


def _first(rows: set[int]) -> str:
    shown = ", ".join(map(str, sorted(rows)[:6]))
    return f"{shown}, ..." if len(rows) > 6 else shown
