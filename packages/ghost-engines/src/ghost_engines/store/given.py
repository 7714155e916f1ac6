"""Checks of what users give a store or a search: tensors, numbers, devices, stores."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ghost_engines.store.errors import StoreError


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor, or has no number for each of its places.

    Args:
        name: What it is, for the error.
        value: What was given.

    Raises:
        StoreError: If it is something else, sparse, nested, or on meta.
    """
    if not isinstance(value, Tensor):
        raise StoreError(
            f"{name} is a {type(value).__name__}, not a tensor",
            reason="nothing is cast here",
            remedy="make a tensor of it, in the dtype that is to be stored",
        )
    form = "nested" if value.is_nested else "sparse" if value.layout is not torch.strided else ""
    if value.is_meta:
        form = "on meta"
    if form:
        raise StoreError(
            f"{name} is a tensor that is {form}",
            reason="it has no number for each place of a table",
            remedy="give a dense tensor on a device that keeps numbers, such as tensor.to_dense()",
        )


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
