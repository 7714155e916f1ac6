"""Cosines of per-sample gradients with directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ghost_core import Batch, Pass, PerSampleGradient, TrackedParameter
from ghost_engines.held import HeldGradients
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine


@dataclass(frozen=True, kw_only=True, repr=False)
class Cosines(Scores):
    """Dot products of a batch, and the norms that make them cosines.

    They are cosines of contributions, which the weight of a sample's loss cancels out of, as long
    as it is positive.

    Attributes:
        squared_norms: Squared norms of contributions by parameter name, `[N]`.
        squared_direction_norms: Squared norms of directions by parameter name, `[K]`.
    """

    squared_norms: Mapping[str, Tensor]
    squared_direction_norms: Mapping[str, Tensor]


class CosineEngine(ScoringEngine[Cosines]):
    """Scores every training sample by its angle with directions, and by dots.

    It takes the options of `ScoringEngine`, and has all that `DotProductEngine` has: directions,
    observers such as `InRunValues`, scores. Norms need the gradients of a batch until it is closed:
    see `NormEngine`.
    """

    def on_start(self, batch: Batch[Cosines]) -> None:
        """Renew the directions that are due, and hold nothing yet."""
        super().on_start(batch)
        self._held = HeldGradients(self.parameters)

    def multiply(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Multiply with the directions, and hold the gradient."""
        self._held.add(pass_, parameter, gradient)
        return super().multiply(pass_, parameter, gradient)

    def make_scores(
        self, batch: Batch[Cosines], dots: Mapping[str, Tensor], token_dots: Tensor | None
    ) -> Cosines:
        """Return dots and norms."""
        squared = {
            name: values / self.scale / self.scale
            for name, values in self._held.squared_norms(batch.n).items()
        }
        return Cosines(
            ids=batch.ids,
            verified=batch.verified,
            by_parameter=dots,
            directions=self.directions,
            token_dots=token_dots,
            squared_norms=squared,
            squared_direction_norms=self.squared_direction_norms(),
        )

    def on_close(self) -> None:
        """Let go of sums and gradients."""
        super().on_close()
        self._held = HeldGradients(())
