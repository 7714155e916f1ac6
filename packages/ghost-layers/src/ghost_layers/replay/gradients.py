"""Per-sample gradients of a call that is run again, in one of the ways that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Size, Tensor

from ghost_core import Dense, PerSampleGradient
from ghost_core._torch import start_of_backward, vmap
from ghost_core.differentiation import differentiated
from ghost_layers.replay.linear_maps import differentiate
from ghost_layers.replay.plan import Plan, Replay, Way

_AT_ONCE = 2**25
"""Elements of per-sample gradients that one vectorised backward pass makes at once."""

Columns = dict[str, Tensor | None]
"""Gradients of all samples, `[N, *shape]` by local name; None of what the call did not use."""


def gradients(
    plan: Plan, replay: Replay, slopes: Mapping[int, Tensor], shapes: Mapping[str, Size]
) -> dict[str, Dense]:
    """Return the per-sample gradients by local name, in the parameters' dtype.

    Args:
        plan: How to run the call.
        replay: Its tensors.
        slopes: Gradients of the loss, rows first, by position among the recorded outputs.
        shapes: Shapes of the parameters asked for.

    Raises:
        OtherOutputsError: If the call, where it is not proven to run in this way, does not.
    """
    grads = [slopes.get(output.index) for output in plan.outputs]
    wanted = {local: replay.values[plan.wanted[local]] for local in shapes}
    count = next(len(grad) for grad in grads if grad is not None)
    if not count:
        return {
            local: Dense(value.new_zeros(0, 1, *shapes[local])) for local, value in wanted.items()
        }
    make = _by_copies if plan.way is Way.VMAP else _by_backward_passes
    with torch.enable_grad(), plan.conditions():
        made = make(plan, replay, grads, wanted)
    return {
        local: Dense(value.new_zeros(count, 1, *value.shape), used=False)
        if (rows := made[local]) is None
        else Dense(rows.unsqueeze(1))
        for local, value in wanted.items()
    }


def written_gradients(
    plan: Plan, replay: Replay, grads: Sequence[Tensor | None], shapes: Mapping[str, Size]
) -> dict[str, PerSampleGradient]:
    """Return the per-sample gradients of a call that is written out, by local name.

    Args:
        plan: How to run the call.
        replay: Its tensors.
        grads: Gradients of the loss for each recorded output, rows first.
        shapes: Shapes of the parameters asked for.

    Raises:
        OtherOutputsError: If the formula does not return what the call did.
    """
    around = nullcontext() if plan.draws_nothing else plan.conditions()
    with torch.enable_grad(), around:
        with replay.unproven():
            written = plan.written_out(replay.values, plan.whole(replay.inputs))
            replay.check(plan, plan.rows_first([written.outputs[out.at] for out in plan.outputs]))
        outputs, slopes = [], []
        for output in plan.outputs:
            if (grad := grads[output.index]) is not None:
                outputs.append(written.outputs[output.at])
                slopes.append(replay.in_rows(grad).movedim(0, output.axis).to(outputs[-1].dtype))
        made = differentiate(outputs, slopes, written.maps, shapes)
    if replay.rows is None:
        return made
    return {local: gradient.narrow(replay.rows) for local, gradient in made.items()}


def _by_copies(
    plan: Plan, replay: Replay, grads: list[Tensor | None], wanted: dict[str, Tensor]
) -> Columns:
    """Give each sample a copy of the parameters, and take one backward pass for all of them.

    Two samples and a scale `[4]`, shared in memory, each with a gradient of its own:

        leaf = scale.expand(2, 4).requires_grad_()
        outputs = torch.vmap(lambda scale, x: scale * x)(leaf, inputs)  # [2, 4]
        autograd.grad(outputs, leaf, grads)  # [2, 4], row n of sample n alone
    """
    own, rows = plan.own(replay.inputs), replay.rows
    if plan.random is not None:  # the same numbers are drawn for all rows of the call only
        grads, rows = [None if grad is None else replay.in_rows(grad) for grad in grads], None
    elif rows is not None:
        own = [value[rows] for value in own]
    count = next(len(grad) for grad in grads if grad is not None)
    elements = sum(value.numel() for value in wanted.values())
    size = count if plan.random is not None else max(1, _AT_ONCE // max(1, elements))

    def one(given: list[Tensor]) -> list[Tensor]:
        mine = dict(zip(wanted, given, strict=False))
        return plan.run_one(_with(plan, replay, mine), replay.inputs, given[len(wanted) :])

    made = []
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        leaves = {
            local: value.detach().expand(part.stop - start, *value.shape).requires_grad_()
            for local, value in wanted.items()
        }
        own_part = [value[part] for value in own]
        with replay.unproven():
            outputs = vmap(one, [*leaves.values(), *own_part], plan.randomness)
            replay.check(plan, outputs, part if rows is None else rows[part])
        slopes = [None if grad is None else grad[part] for grad in grads]
        made.append(_differentiated(outputs, slopes, leaves, replay))
    joined = _joined(torch.cat, made, wanted)
    if plan.random is None or replay.rows is None:
        return joined
    return {local: None if value is None else value[replay.rows] for local, value in joined.items()}


def _by_backward_passes(
    plan: Plan, replay: Replay, grads: list[Tensor | None], wanted: dict[str, Tensor]
) -> Columns:
    leaves = _leaves(wanted)
    with replay.unproven():
        outputs = plan.run_whole(_with(plan, replay, leaves), replay.inputs)
        replay.check(plan, plan.rows_first(outputs))
    count = next(len(grad) for grad in grads if grad is not None)
    rows = [0] * count if plan.count == 1 else replay.positions.tolist()
    made = []
    for n, row in enumerate(rows):
        slopes = [
            None if grad is None else _in_row(grad[n], value, output.axis, row)
            for grad, value, output in zip(grads, outputs, plan.outputs, strict=True)
        ]
        made.append(_differentiated(outputs, slopes, leaves, replay))
    return _joined(torch.stack, made, leaves)


def _in_row(grad: Tensor, output: Tensor, axis: int, row: int) -> Tensor:
    """Give one sample's gradient zeros in all other rows, unless samples share the only one."""
    if output.shape[axis] == 1:
        return grad.unsqueeze(axis)
    slope = torch.zeros_like(output)
    slope.select(axis, row).copy_(grad)
    return slope


def _leaves(wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {local: value.detach().requires_grad_() for local, value in wanted.items()}


def _with(plan: Plan, replay: Replay, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**replay.values, **{plan.wanted[local]: value for local, value in wanted.items()}}


def _differentiated(
    outputs: Sequence[Tensor],
    slopes: Sequence[Tensor | None],
    leaves: Mapping[str, Tensor],
    replay: Replay,
) -> list[Tensor | None]:
    pairs = [
        (output, slope)
        for output, slope in zip(outputs, slopes, strict=True)
        if slope is not None and output.requires_grad
    ]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        start = start_of_backward(*zip(*pairs, strict=True))
        near = (*replay.inputs, *replay.values.values(), *outputs)
        found = differentiated(start, list(leaves.values()), near)
    return [None if each is None else each.to_dense() for each in found]  # of a sparse lookup


def _joined(
    join: Callable[[list[Tensor]], Tensor],
    made: Sequence[Sequence[Tensor | None]],
    wanted: Iterable[str],
) -> Columns:
    """Join what several backward passes made, which go through the same operations."""
    columns: Columns = {}
    for local, column in zip(wanted, zip(*made, strict=True), strict=True):
        parts = [each for each in column if each is not None]
        columns[local] = join(parts) if parts else None
    return columns
