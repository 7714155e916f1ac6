"""Engines that hold a batch's gradients and divide the weights of losses out."""

from __future__ import annotations

from typing import TypeVar, Unpack

from torch import nn

from ghost_core import (
    Batch,
    CaptureError,
    EngineOptions,
    Pass,
    PerSampleGradient,
    TrackedParameter,
)
from ghost_engines.held import HeldGradients
from ghost_engines.weighing import LossWeights, WeighingEngine

ResultT = TypeVar("ResultT")


class HoldingEngine(WeighingEngine[ResultT]):
    """Holds the gradients of a batch, and knows the weight that each sample's loss had in it.

    A subclass writes `on_end`, from `held` and `divisors`.

    Args:
        model: The module that the training loop calls.
        loss_weights: What the backpropagated loss was, of the samples' own losses: their "mean",
            their "sum", or "given": a sum with the weights that each `batch` is opened with.
        options: What all engines take: see `Engine`. With `grad_scaler`, a batch whose gradients
            overflow has results that are not finite.

    Raises:
        UnknownNameError: If a glob matches nothing, or `loss_weights` does not exist.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
        CaptureError: If `loss_weights` are numbers, no trainable parameter is selected or a module
            is compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_weights: LossWeights | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(model, loss_weights=loss_weights, **options)
        if loss_weights is None:
            raise CaptureError(
                f"{type(self).__name__} needs loss_weights, the weight of each sample's own loss "
                "in the backpropagated one: 'sum', 'mean' or 'given'; there is no default"
            )
        self._n = 0
        self.held = HeldGradients(())
        """The gradients of the open batch: of contributions, times the scale of a scaler."""

    def on_start(self, batch: Batch[ResultT]) -> None:
        """Hold nothing yet."""
        self._n = batch.n
        self.held = HeldGradients(self.parameters)

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Hold the gradient."""
        self.check_mean(pass_, self._n)
        self.held.add(pass_, parameter, gradient)

    def on_close(self) -> None:
        """Let go of the gradients."""
        super().on_close()
        self.held = HeldGradients(())
