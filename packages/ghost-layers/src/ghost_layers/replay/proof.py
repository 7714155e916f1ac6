"""Compares the gradients of two ways to run a call again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Generator, Tensor

from ghost_layers.replay.gradients import gradients
from ghost_layers.replay.plan import Plan, Replay, Way

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF = 6e-2
_FLOOR = 1e-3
"""Share of a whole gradient; a parameter's gradient that is smaller is measured against this."""


def same_gradients(plan: Plan, other: Plan, replay: Replay, recorded: Sequence[Tensor]) -> bool:
    """Tell whether two ways give the first and the last sample the same gradients.

    Outputs do not show everything: beside values that are hundreds of times larger, other random
    numbers go unseen, and a hook or a branch inside may change gradients alone.

    Args:
        plan: The call as it was.
        other: Another way to run it, which has returned the same.
        replay: Its tensors.
        recorded: Its outputs, rows first.
    """
    if other.way is Way.REWRITTEN:  # by formulas that are known
        return True
    rows = torch.tensor([0, plan.count - 1])
    narrowed = replace(replay, values={k: v.detach() for k, v in replay.values.items()})
    narrowed = narrowed.narrow(rows)
    slopes = _slopes(plan, recorded)
    shapes = {local: replay.values[key].shape for local, key in plan.wanted.items()}
    # In a thread of its own, where hooks on saved tensors, as checkpointing has them, neither see
    # this nor keep torch.func from working.
    with ThreadPoolExecutor(max_workers=1) as apart:
        made = [apart.submit(gradients, each, narrowed, slopes, shapes) for each in (plan, other)]
        try:
            mine, theirs = (each.result() for each in made)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # then the call as it was has to do, or is refused
            return False
    dtypes = {value.dtype for value in (*slopes.values(), *mine.values())}
    tolerance = max(_TOLERANCES.get(dtype, _HALF) for dtype in dtypes)
    if plan.autocast[1] is not None:
        tolerance = _HALF
    return _are_close(mine, theirs, tolerance)


def _slopes(plan: Plan, recorded: Sequence[Tensor]) -> dict[int, Tensor]:
    generator = Generator().manual_seed(0)
    slopes = {}
    for output in plan.outputs:
        like = recorded[output.index]
        drawn = torch.randn(2, *like.shape[1:], generator=generator)
        slopes[output.index] = drawn.to(like)
    return slopes


def _are_close(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> bool:
    norms = {local: float(each.double().norm()) for local, each in mine.items()}
    floor = _FLOOR * sum(norm**2 for norm in norms.values()) ** 0.5
    return all(
        float((each.double() - theirs[local].double()).norm())
        <= tolerance * max(norms[local], floor)
        for local, each in mine.items()
    )
