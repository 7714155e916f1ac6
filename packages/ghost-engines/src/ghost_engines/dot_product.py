"""Dot products of per-sample gradients with directions, while training runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ghost_core import Batch
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine


class DotProductEngine(ScoringEngine[Scores]):
    """Scores every training sample against directions, from the training's own backward pass.

    Training is bit-identical with and without it. The dots serve In-Run Data Shapley (Wang et al.,
    2024, eq. 6): see `InRunValues`.

    It takes the options of `ScoringEngine`.
    """

    def make_scores(
        self, batch: Batch[Scores], dots: Mapping[str, Tensor], token_dots: Tensor | None
    ) -> Scores:
        """Return the dots."""
        return Scores(
            ids=batch.ids,
            verified=batch.verified,
            by_parameter=dots,
            directions=self.directions,
            token_dots=token_dots,
        )
