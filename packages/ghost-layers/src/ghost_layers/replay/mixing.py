"""Asserts that no sample's outputs depend on another sample's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ghost_core import WrongSplitError
from ghost_core._torch import start_of_backward
from ghost_core.split import nan_in, numbers_in
from ghost_layers.replay.plan import Plan
from ghost_layers.replay.trial import Trial

_HALF = (torch.float16, torch.bfloat16)


def check_unmixed(trial: Trial, plan: Plan, gradients: Mapping[str, Tensor]) -> None:
    """Assert that no row of a call's outputs depends on another sample's row of its inputs.

    Inputs without a gradient may be tables that have as many rows as there are samples by chance;
    nothing that is tracked depends on whether they are.

    Args:
        trial: The call.
        plan: How it ran.
        gradients: Its gradients, as the trial returns them.

    Raises:
        WrongSplitError: If one does.
    """
    own = plan.own(trial.replay.inputs)
    # Where it got one input without a gradient, its code may rely on that, and set the flag of
    # what it makes of it.
    if len(own) == 1 and not own[0].requires_grad:
        mixes = _changes_with_others(trial, plan, gradients)
    else:
        mixes = _lets_nan_through(trial, plan)
    if mixes:
        raise WrongSplitError(
            reason="a sample's output depends on other samples, as where something normalises "
            "over the batch",
            remedy="put BatchNorm layers into evaluation mode, or say where the samples are, with "
            "batch_dim",
        )


def _changes_with_others(trial: Trial, plan: Plan, gradients: Mapping[str, Tensor]) -> bool:
    """Tell whether a sample's output or gradients change with the other samples' inputs."""
    for at, row in enumerate((0, plan.count - 1)):
        one = slice(row, row + 1)
        inputs = tuple(
            value.detach()[one].expand_as(value).clone() if rows.own else value.detach()
            for rows, value in zip(plan.input_rows, trial.replay.inputs, strict=True)
        )
        if not trial.same_outputs(plan, [value[one] for value in trial.run(plan, inputs)], one):
            return True
        found = trial.gradients(plan, inputs)
        if not trial.same_gradients(
            {key: each[at] for key, each in found.items()},
            {key: each[at] for key, each in gradients.items()},
        ):
            return True
    return False


def _lets_nan_through(trial: Trial, plan: Plan) -> bool:
    """Tell whether NaN in one sample's gradient reaches another sample's inputs."""
    given, sources = [], []
    for rows, value in zip(plan.input_rows, trial.replay.inputs, strict=True):
        mine = rows.own and value.is_floating_point() and value.requires_grad
        given.append(value.detach().requires_grad_(mine))
        sources += given[-1:] if mine else []
    if not sources:
        return False
    with trial.watched(plan, trial.guard(differentiable=True)):
        outputs = [
            (value, each.axis)
            for value, each in zip(plan.run_whole(trial.values, given), plan.outputs, strict=True)
            if value.requires_grad and value.shape[each.axis] > 1
        ]
        return bool(outputs) and any(
            _reaches_others(outputs, sources, row) for row in (0, plan.count - 1)
        )


def _reaches_others(
    outputs: Sequence[tuple[Tensor, int]], sources: Sequence[Tensor], row: int
) -> bool:
    """Send NaN, which survives multiplication by zero, into the gradient of one row.

    NaN in row 1 of the outputs of three samples reaches

        row 1 of the inputs    no sample is mixed
        rows 0, 1, 2           they are, as where something normalises over the batch
        rows 0, 1              so they are; in half precision numbers have to reach both, too

    Args:
        outputs: Outputs, and where they have their rows.
        sources: Inputs with rows, rows first.
        row: The row.
    """
    for slope in (nan_in, numbers_in):
        try:
            with torch.autograd.set_detect_anomaly(False):  # which takes NaN for a mistake
                slopes = [slope(value, [row], axis) for value, axis in outputs]
                start = start_of_backward([value for value, _ in outputs], slopes)
                found = torch.autograd.grad(start, sources, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise WrongSplitError(
                reason=f"whether it mixes samples cannot be told: {error}"
            ) from error
        grads = [grad for grad in found if grad is not None]
        hits = [(grad != 0).reshape(len(grad), -1).any(1) for grad in grads]
        if not any(hit[:row].any() or hit[row + 1 :].any() for hit in hits):
            return False
        # Half-precision kernels of some CPUs let NaN leak to the row before; numbers do not, and
        # the first row has none.
        if row == 0 or not any(grad.dtype in _HALF for grad in grads):
            return True
    return True
