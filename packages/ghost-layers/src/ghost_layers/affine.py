"""What all layers share that have one weight and one bias."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Size, Tensor

from ghost_core import GradientSampler, PastCall, PerSampleGradient, Record


class AffineSampler(GradientSampler):
    """Per-sample gradients of a layer that maps its input by a weight, then adds a bias."""

    parameters: ClassVar[tuple[str, ...] | None] = ("weight", "bias")

    @abstractmethod
    def weight_gradient(self, record: Record, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Return the gradients of the weight.

        Args:
            record: What was kept for the weight.
            grad: The output gradient.
            shape: Shape of the weight.
        """

    @abstractmethod
    def bias_gradient(self, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Return the gradients of the bias, which are the output gradient's terms."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Pair what was kept with the output gradient."""
        (grad,) = grads
        assert grad is not None
        return {
            name: self.bias_gradient(grad, shape)
            if name == "bias"
            else self.weight_gradient(records[name], grad, shape)
            for name, shape in call.shapes.items()
        }
