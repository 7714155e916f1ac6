"""A batch on its way to a step: what became of its gradients, and what it will be credited with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost_engines.held import HeldGradients
from ghost_engines.scores import Scores
from ghost_engines.values.changes import Change


@dataclass
class Pending:
    """A batch that no step was made with yet.

    Attributes:
        scores: Its scores.
        factors: What its gradients were multiplied with, by the names of the parameters whose
            gradients were not thrown away.
        scale: What the loss was multiplied with, and scores were divided by.
        held: Its gradients, if the second order is asked for.
        second: What the second order adds, by parameter name `[N, K]`, before rates and factors.
        altered: Whether gradients were changed in another way.
    """

    scores: Scores
    factors: dict[str, float]
    scale: float
    held: HeldGradients | None = None
    second: Mapping[str, Tensor] | None = None
    altered: bool = False

    def apply(self, change: Change) -> None:
        """Do what was done to its gradients."""
        self.factors = {
            name: factor * change.factors.get(name, 1.0)
            for name, factor in self.factors.items()
            if name not in change.lost
        }
        self.altered |= not change.other.isdisjoint(self.factors)

    def credit(self, rates: Mapping[str, float], directions: Sequence[str]) -> Tensor:
        """Return what it is credited with, float64 `[N, K]` on the CPU.

        Args:
            rates: What the step multiplies gradients with, by parameter name.
            directions: Names of the K directions.
        """
        columns = [self.scores.directions.index(name) for name in directions]
        values = torch.zeros(len(self.scores.ids), len(columns), dtype=torch.float64)
        for name, dots in self.scores.by_parameter.items():
            if name in self.factors:
                found = dots[:, columns].to("cpu", torch.float64)
                if self.second is not None:
                    found = found + self.second[name].to("cpu", torch.float64)
                values += rates[name] * self.factors[name] * found
        return values
