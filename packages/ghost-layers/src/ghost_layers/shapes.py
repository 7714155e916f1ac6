"""How layers lay out their inputs and outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ghost_core import Call, WrongSplitError


def channels_last(values: Tensor) -> Tensor:
    """Fold all axes behind the channels into positions: `[N, C, ...]` to `[N, T, C]`, a view."""
    return (values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)).mT


def only_input(call: Call) -> Any:
    """Return the input of a layer that has one, whatever its forward calls it."""
    (value,) = (*call.args, *call.kwargs.values())
    return value


def check_samples(call: Call, rank: int) -> None:
    """Raise if a layer ran without an axis for samples.

    Args:
        call: The call.
        rank: Number of axes that the output has if the first one is the samples.

    Raises:
        WrongSplitError: If the output has fewer axes.
    """
    output = call.outputs[0]
    if output.dim() < rank:
        shape = tuple(output.shape)
        raise WrongSplitError(
            f"{call.label} returned one sample of shape {shape}, without an axis for samples",
            reason=f"an output with samples has {rank} axes or more here",
            remedy=f"give it inputs [N, ...]{call.or_exclude}",
        )
