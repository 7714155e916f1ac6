"""Checks of what directions are made of, however they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, TrackedParameter, UnknownNameError
from ghost_core.algebra import accumulation_dtype


def given(
    name: str,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    parameters: Iterable[TrackedParameter],
) -> dict[str, Tensor]:
    """Check a direction given by parameter name, and copy it.

    Raises:
        UnknownNameError: If a name is no parameter of the model.
        CaptureError: If a tracked parameter is missing, or a shape or value is wrong.
    """
    known = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key in tensors:
        if key not in known:
            raise UnknownNameError("parameter", key, known, f"In direction {name!r}.")
    found = {}
    for parameter in parameters:
        aliases = [alias for alias in parameter.aliases if alias in tensors]
        if not aliases:
            raise CaptureError(
                f"direction {name!r} has no tensor for {parameter.name}; give zeros, or select "
                "parameters with layers=..."
            )
        alias = aliases[0]
        for other in aliases[1:]:
            if not torch.equal(tensors[alias], tensors[other]):
                raise CaptureError(
                    f"direction {name!r} has different tensors for {alias} and {other}, which are "
                    "one parameter"
                )
        if tensors[alias].shape != parameter.shape:
            raise CaptureError(
                f"direction {name!r} has shape {tuple(tensors[alias].shape)} for {alias}, whose "
                f"shape is {tuple(parameter.shape)}"
            )
        value = tensors[alias].detach().to(parameter.device, copy=True)
        found[parameter.name] = widened(value)
    return finite(name, found)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that products are computed in."""
    return tensor.to(accumulation_dtype(tensor))


def finite(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that are finite.

    Raises:
        CaptureError: If they are not.
    """
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise CaptureError(f"direction {name!r} is not finite at {key}")
    return tensors
