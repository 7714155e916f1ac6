"""Engines that hold a batch's gradients and divide the weights of losses out."""

from __future__ import annotations

from typing import TypeVar

from ghost_core import Batch, Pass, PerSampleGradient, TrackedParameter
from ghost_engines.held import HeldGradients
from ghost_engines.weighing import WeighingEngine

ResultT = TypeVar("ResultT")


class HoldingEngine(WeighingEngine[ResultT]):
    """Holds the gradients of a batch, and knows the weight that each sample's loss had in it.

    A subclass writes `on_end`, from `held` and `divisors`.

    It takes the options of `WeighingEngine`, of which `loss_weights` must be given. With
    `grad_scaler`, a batch whose gradients overflow has results that are not finite.
    """

    needs_weights = True
    held = HeldGradients(())
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
