"""Checks of what users give: models and whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from ghost_core.errors import CaptureError, GhostError


def whole(
    name: str, value: Any, *, least: int | None = None, error: type[GhostError] = CaptureError
) -> int:
    """Return a whole number as python's own, which one of numpy is not.

    Args:
        name: What it is, for the error.
        value: What was given.
        least: The least that it may be.
        error: What to raise.

    Raises:
        GhostError: Of the kind given, if it is no whole number (True and 1.0 are none), or less.
    """
    bound = "" if least is None else f"at least {least}, "
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise error(
            f"{name} must be {bound}a whole number, not {value!r}",
            reason=f"it is of type {type(value).__name__}",
            remedy=f"give an int, such as {max(least or 1, 1)}",
        )
    if least is not None and value < least:
        raise error(f"{name} must be at least {least}, not {value}")
    return int(value)


def module(value: Any) -> nn.Module:
    """Return a model.

    Raises:
        CaptureError: If it is none.
    """
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, type):
        reason = "it is a class, of which no model was made"
    else:
        reason = f"it is of type {type(value).__name__}"
    raise CaptureError(
        f"the model must be a torch.nn.Module, not {value!r}",
        reason=reason,
        remedy="give the model itself, the object that the training loop calls",
    )
