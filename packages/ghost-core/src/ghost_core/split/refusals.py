"""Why gradients cannot be split by sample, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ghost_core._torch import is_batch_norm
from ghost_core.errors import WrongSplitError
from ghost_core.tracking import TrackedModule

_CANNOT = "gradients cannot be split by sample"


def wrong_split(
    model: nn.Module,
    tracked: Mapping[str, TrackedModule],
    sample: int,
    mixed: Mapping[str, Sequence[int]],
    scalars: Collection[str],
) -> WrongSplitError:
    """Explain what a probe found.

    Args:
        model: The root module.
        tracked: The tracked modules by name.
        sample: The sample whose output gradient was changed.
        mixed: Rows that this changed, by name of a module where it should not have.
        scalars: Names of modules of which a scalar changed.
    """
    modules = "\n".join(
        f"  {tracked[name].label}: rows {_listed(rows)}" for name, rows in mixed.items()
    )
    reason, remedy = _why_mixed(model, tracked, sample, mixed, scalars)
    return WrongSplitError(
        f"{_CANNOT}: changing the gradient of sample {sample}'s "
        f"output alone changes other rows at\n{modules}",
        reason=reason,
        remedy=remedy,
    )


def _why_mixed(
    model: nn.Module,
    tracked: Mapping[str, TrackedModule],
    sample: int,
    mixed: Mapping[str, Sequence[int]],
    scalars: Collection[str],
) -> tuple[str, str]:
    """Return the likeliest reason for what a probe found, and the remedy; see `wrong_split`."""
    normalizing = [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if is_batch_norm(module) and (module.training or module.running_mean is None)
    ]
    if normalizing:
        return (
            f"{normalizing[0]} normalises over the batch in training mode, so every sample's loss "
            "depends on all others",
            "Put BatchNorm layers into evaluation mode, or use GroupNorm.",
        )
    if owned := [name for name in mixed if tracked[name].row_owner]:
        return (
            f"the rows of {owned[0]} do not belong to the samples that "
            f"{tracked[owned[0]].row_owner!r} tells",
            "Give the position in the batch of each row's sample, or leave these modules out with "
            "exclude=...",
        )
    if scalars:
        return (
            "the model's output depends on a scalar that a module computes from all samples",
            "Leave the module out with exclude=...",
        )
    if all(sample not in rows for rows in mixed.values()):
        return (
            "their rows are in another order than the samples, as after sorting or routing",
            "Keep samples in order, say with row_owner={...} which sample each row belongs to, or "
            "leave these modules out with exclude=...",
        )
    return (
        "either their first axis is not the samples (a sequence-first model with as many "
        "positions as samples), or a later operation mixes samples",
        "Put samples on the first axis, or say where they are: batch_dim={'*': 1} for a model "
        "that is sequence-first throughout. Or leave these modules out with exclude=...",
    )


def unclear_fold(tracked: TrackedModule, several: bool) -> WrongSplitError:
    """Explain folded rows whose samples a verification did not tell."""
    reason = (
        "too few of its rows matter for the probed samples to tell whose they are"
        if several
        else "its rows belong to samples in another order than [N, k] or [k, N] flattened"
    )
    return WrongSplitError(
        f"{_CANNOT}: {tracked.label} has more rows than there are samples",
        reason=reason,
        remedy=f"say which sample each row belongs to, with row_owner={{{tracked.name!r}: key}}, "
        "or leave the module out with exclude=...",
    )


def wrong_rows(tracked: TrackedModule, rows: int, n: int, owner: Tensor | None) -> WrongSplitError:
    """Explain an output whose axis for samples does not have the rows that it should have.

    Args:
        tracked: The module.
        rows: Size of that axis.
        n: Number of samples.
        owner: Sample of each row, where the engine was told.
    """
    if owner is not None:
        return WrongSplitError(
            f"{tracked.label} returned {rows} rows, and {tracked.row_owner!r}, which row_owner "
            f"names for it, tells the samples of {len(owner)}: give one entry per row, positions "
            f"of samples from 0 to {n - 1}"
        )
    folded = (
        f", {rows} = {n} * {rows // n}: rows folded into the batch?" if n and rows % n == 0 else ""
    )
    axis = f"axis {tracked.batch_dim}" if tracked.batch_dim else "the first axis"
    name = tracked.name
    return WrongSplitError(
        f"{_CANNOT}: {tracked.label} returned {rows} rows for {n} samples{folded}",
        reason=f"{axis} of its output is not the samples",
        remedy="keep one row per sample, [N, ..., features]; give what is computed once for all "
        f"samples, as positions are, one row, [1, ...]; say where the samples are, with batch_dim="
        f"{{{name!r}: axis}}, or which sample each row belongs to, with row_owner={{{name!r}: "
        "key}; or leave the module out with exclude=...",
    )


def no_samples(output: object, leaves: Sequence[Tensor], n: int, dim: int) -> WrongSplitError:
    """Explain an output of the model without one entry per sample.

    Args:
        output: What the model returned.
        leaves: Its differentiable tensors.
        n: Number of samples.
        dim: Axis on which they should be.
    """
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or type(output).__name__
    expected = ", ".join([*[":"] * dim, str(n), "..."])
    return WrongSplitError(
        f"the model's output does not tell {n} samples apart",
        reason=f"there is no tensor of shape [{expected}] that requires a gradient, only {shapes}",
        remedy="let the model return its outputs and compute the loss outside of it"
        + ("" if dim else "; say which axis holds the samples, as in batch_dim={'': 1}")
        + "; or pass verify=False, which every result records",
    )


def unclear_output(leaves: Sequence[Tensor], n: int) -> WrongSplitError:
    """Explain outputs with several entries per sample of which nothing tells whose they are.

    Args:
        leaves: The model's differentiable outputs.
        n: Number of samples.
    """
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
    return WrongSplitError(
        f"the model's output does not tell {n} samples apart",
        reason=f"it has several entries per sample, {shapes}, and they could be [N, k] flattened "
        "as well as [k, N], or are neither",
        remedy=f"let the model return its outputs with an axis of {n} samples; or pass "
        "verify=False, which every result records",
    )


def routed_wrong(tracked: TrackedModule, rows: Sequence[int]) -> WrongSplitError:
    """Explain rows that belong to several samples each.

    Args:
        tracked: The module.
        rows: Such rows.
    """
    return WrongSplitError(
        f"{_CANNOT}: several samples depend on the same rows of {tracked.label}: rows "
        f"{_listed(rows)}",
        reason="a later operation mixes samples, or its rows are something else than parts of "
        "samples",
        remedy="keep samples apart, or leave the module out with exclude=...",
    )


def scalar_output(tracked: TrackedModule) -> WrongSplitError:
    """Explain a loss that depends on a scalar that a module returned."""
    return WrongSplitError(
        f"{_CANNOT}: the loss depends on a scalar that {tracked.label} returned",
        reason="a scalar belongs to all samples",
        remedy="compute the loss from outputs with one row per sample, or leave the module out "
        "with exclude=...",
    )


def unreached(tracked: TrackedModule) -> WrongSplitError:
    """Explain a gradient at a module that no probe reached."""
    return WrongSplitError(
        f"{_CANNOT}: the loss depends on {tracked.label}, on which the model's output did not "
        "depend when it was verified",
        reason="nothing shows which sample is in which of its rows",
        remedy="let the model return what the loss is computed from, or leave the module out with "
        "exclude=...",
    )


def reached_elsewhere(modules: Iterable[TrackedModule]) -> WrongSplitError:
    """Explain modules that only outputs without samples depend on."""
    return WrongSplitError(
        f"{_CANNOT}: these modules matter only for outputs of the model that do not have one row "
        "per sample:\n" + "\n".join(f"  {tracked.label}" for tracked in modules),
        reason="nothing shows which sample is in which of their rows",
        remedy="let the model return what the loss is computed from, or leave them out with "
        "exclude=...",
    )


def doubted(tracked: TrackedModule, doubt: str) -> WrongSplitError:
    """Explain folded rows in a batch in which nothing can tell how they are folded."""
    return WrongSplitError(
        f"{_CANNOT}: {tracked.label} has more rows than there are samples",
        reason=f"{doubt}, which hides whose its rows are",
        remedy="begin with a batch whose numbers are finite, or leave the module out with "
        "exclude=...",
    )


def late_row(tracked: TrackedModule) -> WrongSplitError:
    """Explain one row for all samples in a pass that is not watched."""
    return WrongSplitError(
        f"{tracked.label} returned one row for all samples, which it did not when the model was "
        "verified",
        reason="what becomes of that row has not been checked",
        remedy="return one row per sample always, or one row from the first batch on, or leave the "
        "module out with exclude=...",
    )


def unfit_row(tracked: TrackedModule, operation: object) -> WrongSplitError:
    """Explain one row for all samples that cannot be expanded."""
    return WrongSplitError(
        f"{tracked.label} computed one row for all samples, which does not fit what {operation} "
        "combines it with once there is one for each sample",
        reason="rows there are not samples",
        remedy=f"say which sample each row belongs to, with row_owner={{{tracked.name!r}: key}}, "
        "or leave the module out with exclude=...",
    )


def misused_row(operations: Mapping[str, str]) -> WrongSplitError:
    """Explain uses of one row for all samples, by label of the module that computed it."""
    return WrongSplitError(
        "these modules compute one row for all samples, and their output is not just added once "
        f"to a value of one row per sample:\n{_lines(operations)}",
        reason="the part of each sample in their gradient cannot be told",
        remedy="expand their input to one row per sample, or leave them out with exclude=...",
    )


def used_outside(operations: Mapping[str, str]) -> WrongSplitError:
    """Explain uses of parameters, by name, outside of the modules that own them."""
    return WrongSplitError(
        f"parameters are used outside the modules that own them:\n{_lines(operations)}",
        reason="their per-sample gradients cannot be seen there",
        remedy=f"leave them out with exclude={','.join(operations)!r}, call the owning module "
        "inside the model instead of using its parameter, or compute penalties on parameters "
        "outside of engine.batch()",
    )


def _lines(operations: Mapping[str, str]) -> str:
    return "\n".join(f"  {name}: {operation}" for name, operation in operations.items())


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:6]))
    return f"{shown}, ..." if len(rows) > 6 else shown
