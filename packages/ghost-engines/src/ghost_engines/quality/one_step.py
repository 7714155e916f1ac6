"""Tail-patch: how much does one training step on what was found lower the query's loss?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghost_core.arguments import module, whole
from ghost_core.differentiation import check_differentiable
from ghost_core.errors import told
from ghost_core.state import seed_generators, untouched, values_kept
from ghost_engines.dataset import PerSampleLoss
from ghost_engines.digest import model_digest
from ghost_engines.quality.errors import QualityError
from ghost_engines.quality.identity import digest_of, identity
from ghost_engines.quality.jobs import Work, Workplace, do_all


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
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: bool | None = None,
) -> TailPatch:
    """Make one step of gradient descent on what was found for each query, and undo it.

    The step is on the mean loss of the samples, with plain gradient descent: what is asked is which
    samples would help, not what an optimizer's state makes of them (Chang et al., 2024, with SGD in
    place of its optimizer). The model runs in the mode that it is in, and is left as it was.

    Args:
        model: The model. Every parameter that requires a gradient takes part in the step. Must be
            picklable for several processes.
        per_sample_loss: Takes the model and a batch, and returns one loss per sample, `[N]`. Must
            be picklable for several processes.
        queries: A batch for each query, most often of one sample; its mean loss counts.
        found: A batch for each query: the samples to make the step on.
        lr: Learning rate of the step.
        seed: Seed of the random number generators for each query, where the model draws any.
        folder: Where to keep each query that is done, so that a second call goes on. It belongs to
            one model with its parameters, buffers and modes, one loss, told apart by its pickle,
            one learning rate and one seed.
        processes: How many queries are asked at once.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Raises:
        QualityError: If there is not one batch for each query, the learning rate is not positive,
            losses are not finite `[N]`, `per_sample_loss` raises, or something cannot be sent to
            other processes or told from others in the folder. What is done is kept.
        OSError: If something cannot be kept.
    """
    if len(queries) != len(found) or not len(queries):
        raise QualityError(f"there are {len(found)} batches found for {len(queries)} queries")
    if not isfinite(lr) or lr <= 0:
        raise QualityError(f"lr must be positive, not {lr}")
    seed = whole("seed", seed, least=0, error=QualityError)
    work = Work[_Patch](
        do=_Step(module(model), per_sample_loss, lr, seed),
        size=2,
        what="the model or its loss",
        whose=lambda: _whose(model, per_sample_loss, lr, seed),
        title="tail-patch",
        unit="query",
    )
    pairs = enumerate(zip(queries, found, strict=True))
    patches = [_Patch(at, *pair, named=folder is not None) for at, pair in pairs]
    losses = torch.from_numpy(do_all(work, patches, Workplace(folder, processes, progress)))
    return TailPatch(*losses.T.contiguous())


@dataclass(frozen=True, eq=False)
class _Patch:
    """A query with what was found for it; `named` if its name must be one for good."""

    at: int
    query: Any
    batch: Any
    named: bool

    @property
    def called(self) -> str:
        return f"the step for query {self.at}"

    @cached_property
    def name(self) -> str:
        if not self.named:
            return str(self.at)
        try:
            return digest_of((self.query, self.batch))[:24]
        except Exception as error:
            raise QualityError(
                f"{self.called} cannot be told from others: {told(error)}",
                reason="in a folder, batches are known by their pickle",
                remedy="give batches of tensors, or leave folder out",
            ) from error

    @property
    def about(self) -> dict[str, Any]:
        return {"query": self.at}


@dataclass(frozen=True)
class _Step:
    """Makes a step, and returns the query's losses before and after, float64 `[2]`."""

    model: nn.Module
    per_sample_loss: PerSampleLoss
    lr: float
    seed: int

    def __call__(self, patch: _Patch) -> np.ndarray:
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        with untouched(self.model), values_kept(parameters):
            seed_generators(self.seed)
            before = self._loss(patch.query)
            with torch.enable_grad():
                loss = _mean(self.per_sample_loss(self.model, patch.batch))
                check_differentiable(loss)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(gradient, alpha=self.lr)
            return np.array([before, self._loss(patch.query)])

    def _loss(self, batch: Any) -> float:
        with torch.no_grad():
            return _mean(self.per_sample_loss(self.model, batch)).item()


def _whose(model: nn.Module, loss: PerSampleLoss, lr: float, seed: int) -> dict[str, str]:
    """Return what a folder says of the steps in it: all that changes what they end with."""
    known = identity(loss, "per_sample_loss")
    state = (
        [each.training for each in model.modules()],
        [name for name, each in model.named_parameters() if each.requires_grad],
    )
    return {
        **known,
        "train": f"tail_patch with {known['train']}",
        "model": f"{type(model).__qualname__} {model_digest(model)} {digest_of(state)}",
        "learning rate": str(float(lr)),
        "seed": str(seed),
    }


def _mean(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not len(losses):
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise QualityError(f"the loss must return one loss per sample, [N], not {found}")
    mean = losses.double().mean()
    if not mean.isfinite():
        raise QualityError("a loss is not finite: choose a smaller lr, or look at the batch")
    return mean
