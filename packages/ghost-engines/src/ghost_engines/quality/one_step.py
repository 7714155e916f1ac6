"""Tail-patch: how much does one training step on what was found lower the query's loss?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core.arguments import module
from ghost_core.state import untouched, values_kept
from ghost_engines.dataset import PerSampleLoss
from ghost_engines.progress import Progress
from ghost_engines.quality.errors import QualityError


@dataclass(frozen=True, repr=False)
class TailPatch:
    """What a step on the samples that were found did to each query.

    Attributes:
        before: Losses before the step, float64 `[Q]`.
        after: Losses after it, float64 `[Q]`.
    """

    before: Tensor
    after: Tensor

    @property
    def gain(self) -> Tensor:
        """By how much the loss fell, float64 `[Q]`."""
        return self.before - self.after

    @property
    def mean(self) -> float:
        """Mean gain."""
        return float(self.gain.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean gain."""
        return float(self.gain.std() / len(self.gain) ** 0.5)

    def __repr__(self) -> str:
        """Say how much it helped."""
        return f"TailPatch(gain {self.mean:.4g} ± {self.error:.2g}, Q={len(self.gain)})"


def tail_patch(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    queries: Sequence[Any],
    found: Sequence[Any],
    *,
    lr: float,
    progress: bool | None = None,
) -> TailPatch:
    """Make one step of gradient descent on what was found for each query, and undo it.

    The step is on the mean loss of the samples, with plain gradient descent: what is asked is which
    samples would help, not what an optimizer's state makes of them (Chang et al., 2024, with SGD in
    place of its optimizer). The model runs in the mode that it is in, and is left as it was.

    Args:
        model: The model. Every parameter that requires a gradient takes part in the step.
        per_sample_loss: Takes the model and a batch, and returns one loss per sample, `[N]`.
        queries: A batch for each query, most often of one sample; its mean loss counts.
        found: A batch for each query: the samples to make the step on.
        lr: Learning rate of the step.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Raises:
        QualityError: If there is not one batch for each query, the learning rate is not positive,
            or losses are not finite `[N]`.
    """
    if len(queries) != len(found) or not len(queries):
        raise QualityError(f"there are {len(found)} batches found for {len(queries)} queries")
    if not isfinite(lr) or lr <= 0:
        raise QualityError(f"lr must be positive, not {lr}")
    parameters = [each for each in module(model).parameters() if each.requires_grad]
    before, after = [], []
    with Progress(len(queries), "tail-patch", progress, unit="query") as bar:
        for query, batch in zip(queries, found, strict=True):
            with untouched(model), values_kept(parameters):
                before.append(_loss(model, per_sample_loss, query))
                with torch.enable_grad():
                    loss = _mean(per_sample_loss(model, batch))
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            parameter.sub_(gradient, alpha=lr)
                after.append(_loss(model, per_sample_loss, query))
            bar.advance(1)
    return TailPatch(*(torch.tensor(each, dtype=torch.float64) for each in (before, after)))


def _loss(model: nn.Module, per_sample_loss: PerSampleLoss, batch: Any) -> float:
    with torch.no_grad():
        return _mean(per_sample_loss(model, batch)).item()


def _mean(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not len(losses):
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise QualityError(f"the loss must return one loss per sample, [N], not {found}")
    mean = losses.double().mean()
    if not mean.isfinite():
        raise QualityError("a loss is not finite: choose a smaller lr, or look at the batch")
    return mean
