"""What an optimizer tells: which one makes the steps, at which rates, and whether it made one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import CaptureError
from ghost_core._torch import tells_of_steps


def stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that makes the steps of one that may be a wrapper, as Accelerate's is.

    Raises:
        CaptureError: If there is none to follow.
    """
    inner: Any = optimizer
    while not (isinstance(inner, torch.optim.Optimizer) and tells_of_steps(inner)):
        if not hasattr(inner, "optimizer"):
            raise CaptureError(
                f"{type(optimizer).__name__} does not tell of its steps",
                reason="it is not set up as a torch.optim.Optimizer and has none in .optimizer",
                remedy="give InRunValues the optimizer inside that makes the steps",
            )
        inner = inner.optimizer
    return inner


def rates(leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of each tracked parameter, negative where a loss is maximised.

    Args:
        leaves: The tracked parameters by name.
        optimizer: The optimizer that makes the steps.

    Raises:
        CaptureError: If the optimizer does not hold one of them, or none at all.
    """
    held = {leaf: group for group in optimizer.param_groups for leaf in group["params"]}
    found = {}
    for name, leaf in leaves.items():
        group = held.get(leaf)
        if group is None:
            raise _not_held(name, none=held.keys().isdisjoint(leaves.values()))
        found[name] = float(group["lr"]) * (-1 if group.get("maximize") else 1)
    return found


def _not_held(name: str, *, none: bool) -> CaptureError:
    if none:
        return CaptureError(
            f"the optimizer holds none of the parameters that the engine tracks, {name} among them",
            reason="it is that of another model, or was made before the model's parameters were "
            "replaced, as wrapping, moving or loading a model may do",
            remedy="make it of the model that is trained, with model.parameters(), once that is "
            "loaded, moved and wrapped, and the engine of the same model",
        )
    return CaptureError(
        f"the optimizer does not hold {name}",
        reason="no step of it changes that parameter",
        remedy="give the optimizer of this model, or leave the parameter out with exclude=...",
    )


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the step that was called for is none.

    A scaler leaves it to fused optimizers to skip a step, and tells them so.
    """
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow)


def scale_left(optimizer: torch.optim.Optimizer) -> float:
    """Return what gradients are still multiplied with when the step begins.

    A scaler leaves it to fused optimizers to divide by its scale, and tells them the scale.
    """
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
