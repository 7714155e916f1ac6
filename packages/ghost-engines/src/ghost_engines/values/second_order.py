"""The second order of in-run values: what curvature adds to them along the step itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghost_engines.held import HeldGradients
from ghost_engines.scoring import ScoringEngine
from ghost_engines.values.pending import Pending


def add_curvature(
    engine: ScoringEngine[Any],
    batches: Sequence[Pending],
    rates: Mapping[str, float],
    directions: Sequence[str],
) -> None:
    """Set what the second order adds to batches that a step is about to be made with.

    A step `Δ = -η Σ c` changes a loss by `⟨g, Δ⟩ + ⟨Δ, H Δ⟩ / 2`. Of the second term, sample n has
    its own part in one factor, `-η ⟨c_n, H Δ⟩ / 2` (Wang et al., 2024). So each direction costs one
    Hessian-vector product for a step, and the gradients of its batches are multiplied with that as
    with any other direction. All processes that train the model take part in these products, also
    those without a batch, whose samples are no part of the step.

    Args:
        engine: The engine that scored them.
        batches: The batches, with their gradients held.
        rates: What the step multiplies gradients with, by parameter name.
        directions: Names of the K directions.

    Raises:
        CaptureError: If a direction is not the gradient of a loss.
    """
    if not engine.ranks.anywhere(bool(batches)):
        return
    step = _step(engine, batches, rates)
    products = [engine.curvature(name, step) for name in directions]
    stacked = {name: torch.stack([each[name] for each in products]) for name in step}
    for batch in batches:
        assert batch.held is not None
        dots = batch.held.dot(stacked, len(batch.scores.ids))
        scale = batch.scale * engine.ranks.count
        batch.second = {name: each / 2 / scale for name, each in dots.items()}
        batch.held = None


def _step(
    engine: ScoringEngine[Any], batches: Sequence[Pending], rates: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return how far the gradients of some batches move the parameters, by name."""
    step = HeldGradients(engine.parameters).sum()  # zeros
    for batch in batches:
        assert batch.held is not None
        for name, total in batch.held.sum().items():
            step[name] -= rates[name] * batch.factors.get(name, 0.0) / batch.scale * total
    return step
