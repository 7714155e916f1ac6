"""Rows of projected gradients: what a projection engine makes of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghost_engines.blocks import Block
from ghost_engines.results import Result, layers


@dataclass(frozen=True, kw_only=True, repr=False)
class ProjectedRows(Result):
    """Projected gradients of a batch: of each sample's contribution to the backpropagated loss.

    They are of each sample's own loss if the sum of these was backpropagated, or if the engine was
    told their weights.

    Attributes:
        rows: `[N, k_total]` in the storage dtype.
        layout: Which columns belong to which parameter.
        random: Names of modules that dropped something at random, as dropout in training mode:
            the rows are those of one draw.
        manifest: The engine's manifest, by which a store tells rows of other engines; None for
            rows that were put together by hand.
        norms: Norms of the rows, `[N]`, before they were divided by them if they were; they
            estimate those of the gradients. None for rows that were put together by hand.
        model: Digest of the model, as of `model_digest`, by which a store that names its own tells
            rows of others; None if nobody took it, as in training.
    """

    rows: Tensor
    layout: tuple[Block, ...]
    random: tuple[str, ...] = ()
    manifest: Mapping[str, Any] | None = None
    norms: Tensor | None = None
    model: str | None = None

    @property
    def total(self) -> Tensor:
        """The rows, `[N, k_total]`: whole gradients, projected."""
        return self.rows

    @property
    def by_parameter(self) -> dict[str, Tensor]:
        """Columns of each parameter, `[N, k_left · k_right]`."""
        return {block.parameter: self.rows[:, block.columns] for block in self.layout}

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Columns of the parameters that one module owns, side by side."""
        parts = self.by_parameter
        return {
            layer: torch.cat([parts[name] for name in names], dim=1)
            for layer, names in layers(parts).items()
        }

    def _facts(self) -> list[str]:
        columns, dtype = self.rows.shape[1], str(self.rows.dtype).removeprefix("torch.")
        return [*super()._facts(), f"{len(self.layout)} parameters", f"k_total={columns}", dtype]
