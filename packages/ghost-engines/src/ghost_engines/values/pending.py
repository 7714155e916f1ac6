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
        names = [name for name in self.scores.by_parameter if name in self.factors]
        found = _stacked([self.scores.by_parameter[name] for name in names])  # [P, N, K]
        if self.scores.directions != tuple(directions):
            found = found[..., [self.scores.directions.index(name) for name in directions]]
        if self.second is not None:
            found = found + _stacked([self.second[name] for name in names])
        moved = [rates[name] * self.factors[name] for name in names]
        # Brought here at once: each transfer waits for a GPU.
        return torch.einsum("p,pnk->nk", torch.tensor(moved, dtype=torch.float64), found.cpu())


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stack numbers of parameters, which may be on several devices, in float64."""
    device = parts[0].device
    return torch.stack([each.to(device, torch.float64) for each in parts])
