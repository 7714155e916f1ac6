"""Dot products of per-sample gradients with directions, while training runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    EngineOptions,
    Pass,
    PerSampleGradient,
    TrackedParameter,
)
from ghost_core.algebra import as_rows
from ghost_engines.modes import NormSums, as_mode
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine


class DotProductEngine(ScoringEngine[Scores]):
    """Scores every training sample against directions, from the training's own backward pass.

    The dots serve In-Run Data Shapley (Wang et al., 2024, eq. 6): see `InRunValues`. They are the
    same in each mode:

    * `mode="exact"`: training is bit-identical with and without the engine;
    * `mode="fused"`: the engine forms the weight gradient sample by sample, multiplies each while
      it is in the cache, and hands their sum to the training. That takes less, and `.grad` is that
      of plain training up to rounding.

    Args:
        model: The module that the training loop calls.
        mode: How dots come about: "exact" or "fused".
        norms: Whether to take squared norms of contributions too: `Scores.norms` and
            `Scores.cosines`. Gradients of parameters that are used several times are held until the
            batch is closed.
        per_token: As in `ScoringEngine`. In fused mode it saves nothing.
        options: What all engines take: see `Engine`. With `grad_scaler`, a batch whose gradients
            overflow has scores that are not finite.

    Raises:
        UnknownNameError: If a glob matches nothing, or there is no such mode.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
        CaptureError: If no trainable parameter is selected, a module is compiled, or `row_owner` is
            given for one whose gradients are to be kept by token.
    """

    plain_sums = True

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: str = "exact",
        norms: bool = False,
        per_token: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(model, per_token=per_token, **options)
        self._mode = as_mode(mode)
        self.freeze = self._mode.freeze
        self._takes_norms = norms
        self._norms: NormSums | None = None

    def on_start(self, batch: Batch[Scores]) -> None:
        """Renew the directions that are due, and have no norms yet."""
        super().on_start(batch)
        self._norms = NormSums(self.parameters) if self._takes_norms else None

    def multiply(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Multiply with the directions, take norms, and form the sum where it is wanted."""
        directions = None
        if self._tokens is None:
            directions = self._stacked[parameter.name]
        else:
            super().multiply(pass_, parameter, gradient)
        norms = self._norms
        at_once = norms is not None and not norms.holds(pass_, parameter, gradient)
        found = gradient.reduce(directions, norms=at_once, total=self.makes_gradients)
        if found.dots is not None:
            self._dots[parameter.name][pass_.samples] += found.dots
        if norms is not None and found.squared_norms is not None:
            norms.add(pass_, parameter.name, found.squared_norms)
        return found.total

    def make_scores(
        self, batch: Batch[Scores], dots: Mapping[str, Tensor], token_dots: Tensor | None
    ) -> Scores:
        """Return the dots, and the norms if they were taken."""
        squared = of_directions = None
        if self._norms is not None:
            squared = self._norms.squared(batch.n, self.loss_scale)
            of_directions = {
                name: torch.linalg.vector_norm(as_rows(stacked), dim=1).square()
                for name, stacked in self._stacked.items()
            }
        return Scores(
            ids=batch.ids,
            verified=batch.verified,
            by_parameter=dots,
            directions=self.directions,
            token_dots=token_dots,
            squared_norms=squared,
            squared_direction_norms=of_directions,
        )

    def on_close(self) -> None:
        """Let go of the sums."""
        super().on_close()
        self._norms = None
