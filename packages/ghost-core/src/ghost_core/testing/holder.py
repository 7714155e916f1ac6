"""An engine that keeps everything: to look at per-sample gradients in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghost_core import Batch, Dense, Engine, Outer, Pass, PerSampleGradient, TrackedParameter


@dataclass(frozen=True)
class Use:
    """One use of a parameter, as it arrived in a backward pass.

    Attributes:
        samples: Positions of its samples in the batch.
        gradient: The gradients of these samples.
    """

    samples: slice
    gradient: PerSampleGradient


@dataclass(frozen=True)
class Held:
    """Everything that arrived during a batch.

    Attributes:
        n: Number of samples N.
        parameters: Tracked parameters by name.
        uses: What arrived, by parameter name, in order of arrival.
    """

    n: int
    parameters: Mapping[str, TrackedParameter]
    uses: Mapping[str, list[Use]]

    def gradients(self, parameter: str) -> list[PerSampleGradient]:
        """Return the gradients of every use of a parameter."""
        return [use.gradient for use in self.uses[parameter]]

    def materialize(self) -> dict[str, Tensor]:
        """Return the per-sample gradients, summed over uses: float64 `[N, *shape]` by name."""
        return {name: self._total(parameter) for name, parameter in self.parameters.items()}

    def _total(self, parameter: TrackedParameter) -> Tensor:
        total = torch.zeros(self.n, *parameter.shape, dtype=torch.float64, device=parameter.device)
        for use in self.uses[parameter.name]:
            total[use.samples] += use.gradient.materialize().double()
        return total


class GradientHolder(Engine[Held]):
    """Keeps the per-sample gradients of a batch as they arrive; the result is all of them.

    It takes the arguments of `Engine`. Memory is of no concern to it: use it in tests only.
    """

    def on_start(self, batch: Batch[Held]) -> None:
        """Start with nothing."""
        self._uses: dict[str, list[Use]] = {parameter.name: [] for parameter in self.parameters}

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Keep the gradients."""
        self._uses[parameter.name].append(Use(pass_.samples, _apart(gradient)))
        return None

    def on_end(self, batch: Batch[Held]) -> Held:
        """Return everything that arrived."""
        return Held(
            batch.n, {parameter.name: parameter for parameter in self.parameters}, self._uses
        )

    def on_close(self) -> None:
        """Leave what was kept to the result."""
        self._uses = {}


def _apart(gradient: PerSampleGradient) -> PerSampleGradient:
    """Return a gradient in memory of its own: of one sample, it may be what `.grad` becomes."""
    if type(gradient) is Dense:
        return replace(gradient, terms=gradient.terms.clone())
    if type(gradient) is Outer:
        return replace(gradient, grad=gradient.grad.clone())
    return gradient
