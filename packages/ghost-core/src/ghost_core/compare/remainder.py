"""What is left of autograd's gradients once ghost's are taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ghost_core._torch import is_graph_gone
from ghost_core.algebra import PerSampleGradient, accumulation_dtype, as_rows, matrix_shape
from ghost_core.capture import Pass
from ghost_core.differentiation import differentiated
from ghost_core.errors import CaptureError
from ghost_core.tracking import TrackedParameter


@dataclass
class Remainder:
    """What is left of the expected gradients once ghost's are taken away.

    Attributes:
        samples: Positions of the K samples in the batch.
        left: `[K, *shape]` by parameter.
        norms: Norms of what was there at first, float64 `[K]` by parameter.
        strays: How far ghost's operations are from ghost's own gradients, float64 `[K]` by
            parameter.
    """

    samples: tuple[int, ...]
    left: dict[str, Tensor]
    norms: dict[str, Tensor]
    strays: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.strays = {name: torch.zeros_like(norm) for name, norm in self.norms.items()}

    @classmethod
    def of(
        cls,
        losses: Tensor,
        parameters: dict[str, nn.Parameter],
        samples: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> Remainder:
        """Ask autograd for the gradients of some samples, one call each.

        Args:
            losses: One loss per sample, `[N]`.
            parameters: The tracked parameters by name.
            samples: Positions of the samples.
            progress: Called with 1 after each sample.

        Raises:
            CaptureError: If a gradient is not finite, or the losses were backpropagated before.
        """
        left = {
            name: torch.zeros(
                len(samples),
                *parameter.shape,
                dtype=accumulation_dtype(parameter),
                device=parameter.device,
            )
            for name, parameter in parameters.items()
        }
        for at, sample in enumerate(samples):
            gradients = _gradients(losses[sample], list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    left[name][at] = gradient.to_dense()
            if progress is not None:
                progress(1)
        norms = {name: _norms(values) for name, values in left.items()}
        for name, norm in norms.items():
            if not norm.isfinite().all():
                raise CaptureError(
                    f"the gradient of {name} is not finite for a sample, also without ghost: there "
                    "is nothing to compare with"
                )
        return cls(tuple(samples), left, norms)

    def subtract(
        self, weights: Tensor, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Take away one use's gradients.

        Args:
            weights: Factor in each sample's gradient, `[N]`.
            pass_: The pass that they belong to.
            parameter: The parameter.
            gradient: The gradients of the pass's samples.
        """
        start, name = pass_.start, parameter.name
        for at, sample in enumerate(self.samples):
            if start <= sample < start + gradient.n:
                weight = float(weights[sample])
                one = gradient.narrow(slice(sample - start, sample - start + 1))
                values = one.materialize()
                self.left[name][at] -= values[0] / weight
                self.strays[name][at] += _stray(one, values) / weight

    def off(self, parameter: str) -> Tensor:
        """Return how far ghost's gradients and operations are off, float64 `[K]`."""
        return _norms(self.left[parameter]) + self.strays[parameter]


def _stray(gradient: PerSampleGradient, values: Tensor) -> Tensor:
    """Return how far dots and projections of one sample are from its gradient `[1, *shape]`.

    They take other ways through a layer than building the gradient does.
    """
    norm = _norms(values)[0]
    dot = gradient.dot(values)[0, 0]
    off = (dot - norm.square()).abs() / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    matrix = values.reshape(matrix_shape(gradient.shape))
    left, right = (torch.arange(side).to(values).cos()[None] for side in matrix.shape)
    left, right = left / left.norm(), right / right.norm()
    projected = gradient.project(left, right)[0] - left @ matrix @ right.mT
    stray: Tensor = torch.where(norm == 0, dot.double().abs(), off) + projected.norm().double()
    return stray


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    try:
        return differentiated(loss, parameters)
    except RuntimeError as error:
        if not is_graph_gone(error):
            raise
        raise CaptureError(
            "the gradients of the losses cannot be computed, with or without ghost",
            reason="they were backpropagated before",
            remedy="let the function that verify() takes run the model each time, and return the "
            "losses without calling backward()",
        ) from error


def _norms(values: Tensor) -> Tensor:
    """Return the norm of each row, `[K, *shape]` to float64 `[K]`."""
    norms: Tensor = torch.linalg.vector_norm(as_rows(values), dim=1, dtype=torch.float64)
    return norms
