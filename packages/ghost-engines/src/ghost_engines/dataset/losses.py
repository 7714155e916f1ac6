"""Losses of a batch, looked at, and the gradient of a target's mean loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ghost_core import CaptureError, TrackedParameter
from ghost_core.compare import check_losses
from ghost_engines.dataset.batches import Batches
from ghost_engines.directions import ClosureSource

PerSampleLoss = Callable[[Any, Any], Tensor]
"""Runs the model, its first argument, on a batch, its second, and returns a loss for each sample,
floating `[N]`."""


def checked(losses: object, what: str, ids: Tensor | None = None) -> Tensor:
    """Return the losses of a batch after looking at them, `[N]`.

    Args:
        losses: What the user's function returned.
        what: What they are the losses of.
        ids: The samples' ids, `[N]`.

    Raises:
        CaptureError: If it is not one finite loss per sample that depends on the parameters.
    """
    if isinstance(losses, Tensor) and losses.dim() == 1 and losses.is_floating_point():
        if ids is not None and len(losses) != len(ids):
            raise CaptureError(
                f"{what}: there are {len(losses)} losses for {len(ids)} samples",
                remedy="return one loss per sample, [N]; if the batch has another number of "
                "samples than the first axis says, tell which with ids=...",
            )
        if wrong := (~losses.isfinite()).nonzero().flatten().tolist():
            sample = wrong[0] if ids is None else int(ids[wrong[0]])
            raise CaptureError(
                f"{what}: the loss of sample {sample} is {losses[wrong[0]].item()}",
                reason=f"{len(wrong)} of the {len(losses)} losses of its batch are not finite",
                remedy="leave such samples out, or compute in a wider dtype",
            )
    try:
        return check_losses(losses)
    except CaptureError as error:
        raise CaptureError(f"{what}: {error}") from error


def target_gradient(
    name: str,
    data: Batches,
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    parameters: Iterable[TrackedParameter],
    advance: Callable[[int], object],
) -> dict[str, Tensor]:
    """Return the gradient of a target's mean loss by parameter name, summed up in float64.

    Args:
        name: The target's name.
        data: Its batches.
        model: The model.
        per_sample_loss: Computes the losses.
        parameters: The parameters to differentiate.
        advance: Told how many samples are done.

    Raises:
        CaptureError: If losses are not as they must be, or nothing can depend on the target.
    """
    parameters = tuple(parameters)
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in data:
        sizes: list[int] = []

        def summed(batch: Any = batch, sizes: list[int] = sizes) -> Tensor:
            losses = checked(per_sample_loss(model, batch), data.what)
            sizes.append(len(losses))
            return losses.sum()

        found = ClosureSource(name, summed, model, parameters).tensors()
        dtypes = {key: value.dtype for key, value in found.items()}
        for key, value in found.items():
            sums[key] = sums[key].add_(value) if key in sums else value.double()
        count += sum(sizes)
        advance(sum(sizes))
    if not any(value.any() for value in sums.values()):
        raise CaptureError(
            f"{data.what}: the gradient of its mean loss is zero",
            reason="no score can depend on it: all of them would be zero",
            remedy="look at its losses, or leave the target out",
        )
    return {key: (value / count).to(dtypes[key]) for key, value in sums.items()}
