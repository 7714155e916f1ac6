"""Checks of what users give a search: numbers, devices, stores."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ghost_engines.store.errors import StoreError


def number(name: str, value: Any) -> float:
    """Return a number as python's own, which one of numpy or in a tensor is not.

    Args:
        name: What it is, for the error.
        value: What was given.

    Raises:
        StoreError: If it is none, such as True or a string.
    """
    if isinstance(value, Tensor) and not value.dim():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise StoreError(
            f"{name} must be a number, not {value!r}",
            reason=f"it is of type {type(value).__name__}",
            remedy="give a float, such as 0.5",
        )
    return float(value)


def device_of(value: Any) -> torch.device:
    """Return a device on which tensors can be made.

    Raises:
        StoreError: If there is none of that name.
    """
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise StoreError(
            f"device must be one that is there, not {value!r}",
            reason=str(error).splitlines()[0],
            remedy='give "cpu", "cuda" or a torch.device; or move the queries',
        ) from error


def check_store(value: Any) -> None:
    """Refuse what is no store.

    Raises:
        StoreError: If rows cannot be read from it.
    """
    if isinstance(value, type) or not hasattr(value, "scan"):
        raise StoreError(
            f"{value!r} is no store",
            reason=f"it is of type {type(value).__name__}",
            remedy="give what GradientStore.open(path) returns",
        )
