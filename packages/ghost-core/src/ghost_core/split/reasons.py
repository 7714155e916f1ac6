"""Why gradients cannot be split by sample, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghost_core.errors import WrongSplitError
from ghost_core.split.probe import Probe
from ghost_core.tracking import TrackedModule


def wrong_split(
    model: nn.Module, probe: Probe, tracked: Mapping[str, TrackedModule]
) -> WrongSplitError:
    """Explain what a probe found.

    Args:
        model: The root module.
        probe: A probe that reached rows it should not have.
        tracked: The tracked modules by name.
    """
    modules = "\n".join(
        f"  {tracked[name].label}: rows {_listed(rows)}" for name, rows in probe.mixed.items()
    )
    normalizing = [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
    if normalizing:
        reason = (
            f"{normalizing[0]} normalises over the batch in training mode, so every sample's loss "
            "depends on all others."
        )
        remedy = "Put BatchNorm layers into evaluation mode, or use GroupNorm."
    elif owned := [name for name in probe.mixed if tracked[name].row_owner]:
        reason = (
            f"the rows of {owned[0]} do not belong to the samples that "
            f"{tracked[owned[0]].row_owner!r} tells."
        )
        remedy = (
            "Give the position in the batch of each row's sample, or leave these modules out with "
            "exclude=..."
        )
    elif probe.scalars:
        reason = "the model's output depends on a scalar that a module computes from all samples."
        remedy = "Leave the module out with exclude=..."
    elif all(probe.sample not in rows for rows in probe.mixed.values()):
        reason = "their rows are in another order than the samples, as after sorting or routing."
        remedy = (
            "Keep samples in order, say with row_owner={...} which sample each row belongs to, or "
            "leave these modules out with exclude=..."
        )
    else:
        reason = (
            "either their first axis is not the samples (a sequence-first layout with as many "
            "positions as samples), or a later operation mixes samples."
        )
        remedy = (
            "Put samples on the first axis, or say where they are: batch_dim={'*': 1} for a model "
            "that is sequence-first throughout. Or leave these modules out with exclude=..."
        )
    return WrongSplitError(
        f"gradients cannot be split by sample: changing the gradient of sample {probe.sample}'s "
        f"output alone changes other rows at\n{modules}",
        reason=reason,
        remedy=remedy,
    )


def unclear_fold(tracked: TrackedModule, several: bool) -> WrongSplitError:
    """Explain folded rows whose samples a verification did not tell."""
    reason = (
        "too few of its rows matter for the probed samples to tell whose they are"
        if several
        else "its rows belong to samples in another order than [N, k] or [k, N] flattened"
    )
    return WrongSplitError(
        f"gradients cannot be split by sample: {tracked.label} has more rows than there are "
        "samples",
        reason=reason,
        remedy=f"say which sample each row belongs to, with row_owner={{{tracked.name!r}: key}}, "
        "or leave the module out with exclude=...",
    )


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:6]))
    return f"{shown}, ..." if len(rows) > 6 else shown
