"""Per-sample gradients of a call that is run again, in one of the ways that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from ghost_layers.replay.plan import Plan, Replay, Way

_AT_ONCE = 2**25
"""Elements of per-sample gradients that one vectorised backward pass makes at once."""


def gradients(
    plan: Plan, replay: Replay, slopes: Mapping[int, Tensor], shapes: Mapping[str, Size]
) -> dict[str, Tensor]:
    """Return the per-sample gradients `[N, *shape]` by local name, in the parameters' dtype.

    Args:
        plan: How to run the call.
        replay: Its tensors.
        slopes: Gradients of the loss, rows first, by position among the recorded outputs.
        shapes: Shapes of the parameters asked for.
    """
    plan = replace(plan, outputs=tuple(each for each in plan.outputs if each.index in slopes))
    grads = [slopes[output.index] for output in plan.outputs]
    wanted = {local: replay.values[plan.wanted[local]] for local in shapes}
    if not len(grads[0]):
        return {local: value.new_zeros(0, *shapes[local]) for local, value in wanted.items()}
    with torch.enable_grad(), plan.surroundings():
        if plan.way is Way.VMAP:
            try:
                return _vectorised(plan, replay, grads, wanted)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation whose backward pass has no batching rule
                other = Way.LOOP if plan.random is None else Way.BATCH
                return gradients(replace(plan, way=other), replay, slopes, shapes)
        if plan.way is Way.LOOP:
            return _one_by_one(plan, replay, grads, wanted)
        return _by_backward_passes(plan, replay, grads, wanted)


def _vectorised(
    plan: Plan, replay: Replay, grads: list[Tensor], wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    own = plan.own(replay.inputs)
    if plan.random is not None:  # the same numbers are drawn for all rows of the call only
        grads = [replay.in_rows(grad) for grad in grads]
    elif replay.rows is not None:
        own = [value[replay.rows] for value in own]

    def weighted(wanted: dict[str, Tensor], own: list[Tensor], grads: list[Tensor]) -> Tensor:
        values = _with(plan, replay, wanted)
        outputs = plan.run_one(values, replay.inputs, own)
        terms = [(value * grad).sum() for value, grad in zip(outputs, grads, strict=True)]
        return sum(terms[1:], terms[0])

    elements = sum(value.numel() for value in wanted.values())
    vectorised: Any = torch.vmap(
        torch.func.grad(weighted),
        in_dims=(None, 0, 0),
        randomness=plan.randomness,
        chunk_size=max(1, _AT_ONCE // max(1, elements)) if plan.random is None else None,
    )
    made: dict[str, Tensor] = vectorised(wanted, own, grads)
    if plan.random is None or replay.rows is None:
        return made
    return {local: value[replay.rows] for local, value in made.items()}


def _one_by_one(
    plan: Plan, replay: Replay, grads: list[Tensor], wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    leaves = _leaves(wanted)
    values, own = _with(plan, replay, leaves), plan.own(replay.inputs)
    made = []
    for at, row in enumerate(replay.positions.tolist()):
        outputs = plan.run_one(values, replay.inputs, [value[row] for value in own])
        made.append(_differentiated(outputs, [grad[at] for grad in grads], leaves))
    return _stacked(made, leaves)


def _by_backward_passes(
    plan: Plan, replay: Replay, grads: list[Tensor], wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    leaves = _leaves(wanted)
    outputs = plan.run_whole(_with(plan, replay, leaves), replay.inputs)
    rows = [0] * len(grads[0]) if plan.count == 1 else replay.positions.tolist()
    made = []
    for n, row in enumerate(rows):
        slopes = [
            _in_row(grad[n], value, output.axis, row)
            for grad, value, output in zip(grads, outputs, plan.outputs, strict=True)
        ]
        made.append(_differentiated(outputs, slopes, leaves))
    return _stacked(made, leaves)


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
    outputs: Sequence[Tensor], slopes: Sequence[Tensor], leaves: Mapping[str, Tensor]
) -> list[Tensor]:
    pairs = [
        (output, slope)
        for output, slope in zip(outputs, slopes, strict=True)
        if output.requires_grad
    ]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            list(leaves.values()),
            [slope for _, slope in pairs],
            retain_graph=True,
            allow_unused=True,
        )
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(found, leaves.values(), strict=True)
    ]


def _stacked(made: Sequence[Sequence[Tensor]], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {local: torch.stack([rows[at] for rows in made]) for at, local in enumerate(leaves)}
