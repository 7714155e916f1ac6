"""Engines that know which weight each sample's own loss had in the backpropagated one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import ClassVar, Literal, TypeVar, Unpack

import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    CaptureError,
    Engine,
    EngineOptions,
    Pass,
    SampleIds,
    UnknownNameError,
)

ResultT = TypeVar("ResultT")

LossWeights = Literal["mean", "sum", "given"]
"""What the backpropagated loss was: the mean over the samples, their sum, or a weighted sum."""

_LOSS_WEIGHTS = ("mean", "sum", "given")


class WeighingEngine(Engine[ResultT]):
    """Knows the weight that each sample's own loss had in the backpropagated one, if it is told.

    A subclass divides by them: see `weights` and `divisors`.

    Args:
        model: The module that the training loop calls.
        loss_weights: What the backpropagated loss was, of the samples' own losses: their "mean",
            their "sum", or "given": a sum with the weights that each `batch` is opened with. None
            leaves contributions to the backpropagated loss as they are.
        options: What all engines take: see `Engine`.

    Raises:
        UnknownNameError: If a glob matches nothing, or `loss_weights` does not exist.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
        CaptureError: If `loss_weights` are numbers, or missing where a subclass needs them, no
            trainable parameter is selected or a module is compiled.
    """

    needs_weights: ClassVar[bool] = False
    """Whether there must be weights to divide by."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_weights: LossWeights | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(model, **options)
        if loss_weights is not None and not isinstance(loss_weights, str):
            raise CaptureError(
                "weights belong to a batch: make the engine with loss_weights='given', and open "
                "batches with engine.batch(ids, loss_weights=...)"
            )
        if loss_weights not in (None, *_LOSS_WEIGHTS):
            raise UnknownNameError("value of loss_weights", loss_weights, _LOSS_WEIGHTS)
        if loss_weights is None and self.needs_weights:
            raise CaptureError(
                f"{type(self).__name__} needs loss_weights, the weight of each sample's own loss "
                "in the backpropagated one: 'sum', 'mean' or 'given'; there is no default"
            )
        self.loss_weights: LossWeights | None = loss_weights
        """What it was told of the backpropagated loss."""
        self.scaled_weights = torch.empty(0)
        """Of the samples of the open batch: weights times the scale of a scaler, float64 `[N]`."""

    @contextmanager
    def batch(
        self,
        ids: SampleIds,
        *,
        owners: Mapping[str, Tensor] = MappingProxyType({}),
        loss_weights: float | Tensor | None = None,
    ) -> Iterator[Batch[ResultT]]:
        """Capture the forward and backward passes of one batch; see `Engine.batch`.

        Args:
            ids: One integer per sample, `[N]`.
            owners: As in `Engine.batch`.
            loss_weights: For an engine made with `loss_weights="given"`: the weight that each
                sample's own loss has in the backpropagated loss, `[N]`, or one for all.

        Yields:
            The batch, whose result is there once it is closed.

        Raises:
            CaptureError: If weights are missing, not expected, or not one finite number per
                sample; and as `Engine.batch` does.
            WrongSplitError: If gradients cannot be split by sample.
        """
        with super().batch(ids, owners=owners) as batch:
            self.scaled_weights = self._weights(batch.n, loss_weights) * self.loss_scale
            yield batch

    def on_close(self) -> None:
        """Let go of the weights."""
        self.scaled_weights = torch.empty(0)

    def check_mean(self, pass_: Pass, n: int) -> None:
        """Refuse micro-batches where the loss is said to be a mean: it does not say which.

        Args:
            pass_: The pass that gradients come from.
            n: The number of samples of the batch.

        Raises:
            CaptureError: If the pass is shorter.
        """
        if self.loss_weights == "mean" and pass_.n != n:
            raise CaptureError(
                f"loss_weights='mean' does not say which mean, in a batch of {n} samples "
                f"with a micro-batch of {pass_.n}: make the engine with loss_weights='given' and "
                "open engine.batch(ids, loss_weights=...), with 1 / len(ids) if the losses of the "
                "micro-batches are divided by how many there are; or open a batch for each"
            )

    def divisors(self, batch: Batch[ResultT], squared: Tensor) -> Tensor:
        """Return what contributions are divided by to get gradients of own losses, `[N]`, float64.

        Args:
            batch: The batch.
            squared: Squared norms of what is held, `[N]`.

        Raises:
            CaptureError: If gradients arrived from a sample whose weight is zero.
        """
        divisors = self.scaled_weights.to(squared.device)
        wrong = (divisors == 0) & (squared > 0)
        if wrong.any():
            raise CaptureError(
                f"loss_weights are zero for samples {batch.ids[wrong.cpu()].tolist()}, whose "
                "gradients are not: give the weights that the backpropagated loss has"
            )
        return divisors

    def _weights(self, n: int, given: float | Tensor | None) -> Tensor:
        if self.loss_weights == "given" and given is None:
            raise CaptureError(
                "the engine was made with loss_weights='given': open batches with "
                "engine.batch(ids, loss_weights=...)"
            )
        if self.loss_weights != "given" and given is not None:
            raise CaptureError(
                f"the engine was made with loss_weights={self.loss_weights!r}: leave loss_weights "
                "out of engine.batch(), or make the engine with loss_weights='given'"
            )
        if given is None:
            given = 1 / n if self.loss_weights == "mean" and n else 1.0
        return _as_weights(given, n)


def _as_weights(given: float | Tensor, n: int) -> Tensor:
    """Return weights as float64 `[N]` on the CPU."""
    described = type(given).__name__
    if isinstance(given, Tensor):
        described = f"{given.dtype} of shape {tuple(given.shape)}"
        usable = given.shape in ((), (n,)) and not given.is_complex() and given.dtype != torch.bool
    else:
        usable = isinstance(given, int | float) and not isinstance(given, bool)
    if not usable:
        raise CaptureError(
            f"loss_weights must be a tensor of one number per sample, [{n}], or one number for "
            f"all, not {described}"
        )
    weights = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    if not weights.isfinite().all():
        raise CaptureError("loss_weights are not finite")
    return weights.expand(n)
