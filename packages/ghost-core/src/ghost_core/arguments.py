"""Checks of what users give: models, whole numbers, names, switches, scalers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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


def switch(name: str, value: Any) -> bool:
    """Return a switch, which nothing else that is true or false may stand for.

    Args:
        name: What it is, for the error.
        value: What was given.

    Raises:
        CaptureError: If it is neither True nor False.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise CaptureError(
        f"{name} must be True or False, not {value!r}",
        reason=f"it is of type {type(value).__name__}",
        remedy=f"write {name}=True or {name}=False",
    )


def text(name: str, value: Any) -> str:
    """Return a name or another text.

    Args:
        name: What it is, for the error.
        value: What was given.

    Raises:
        CaptureError: If it is no text.
    """
    if isinstance(value, str):
        return value
    raise CaptureError(
        f"{name} must be a str, not {value!r}",
        reason=f"it is of type {type(value).__name__}",
        remedy="give it by name",
    )


def scaler(value: Any) -> torch.amp.GradScaler | None:
    """Return a gradient scaler, or None.

    Raises:
        CaptureError: If it does not tell its scale.
    """
    if value is None or hasattr(value, "get_scale"):
        found: torch.amp.GradScaler | None = value
        return found
    raise CaptureError(
        f"grad_scaler must be a torch.amp.GradScaler, not {value!r}",
        reason="its scale is read in each batch, and divided out",
        remedy="give the scaler that multiplies the loss",
    )
