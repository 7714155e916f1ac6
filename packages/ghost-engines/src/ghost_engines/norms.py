"""Norms of per-sample gradients, and cosines with directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch
from torch import Tensor

from ghost_core import Batch, Pass, PerSampleGradient, SampleIds, Site
from ghost_core.algebra import as_rows
from ghost_engines.dot_product import DotProductEngine
from ghost_engines.held import HeldGradients, cosines
from ghost_engines.holding import HoldingEngine
from ghost_engines.scores import ScoredBatch, Scores, by_layer


@dataclass(frozen=True)
class Norms:
    """Norms of the gradients of a batch: of each sample's own loss.

    Values are float32, or float64 where a parameter is. A sample whose loss had weight zero has
    NaN: its own gradient did not take part in the backward pass.

    Attributes:
        ids: Sample ids, int64 `[N]`.
        squared: Squared norms by parameter name, `[N]`.
        verified: Whether the split by sample was verified on this model.
    """

    ids: Tensor
    squared: Mapping[str, Tensor]
    verified: bool

    @property
    def total(self) -> Tensor:
        """Norms of whole gradients, `[N]`."""
        return torch.stack(list(self.squared.values())).sum(0).sqrt()

    @property
    def by_parameter(self) -> dict[str, Tensor]:
        """Norms by parameter, `[N]`."""
        return {name: squared.sqrt() for name, squared in self.squared.items()}

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Norms by layer, `[N]`, over the parameters that one module owns.

        A parameter shared by modules counts for the first of them.
        """
        return {name: squared.sqrt() for name, squared in by_layer(self.squared).items()}

    @property
    def finite(self) -> Tensor:
        """Which samples have finite norms, bool `[N]`.

        All of them, unless gradients overflowed or a weight is zero.
        """
        return self.total.isfinite()


class NormEngine(HoldingEngine[Norms]):
    """Measures every training sample's gradient, from the training's own backward pass.

    The norms are those of the gradients of the samples' own losses, so the engine must know which
    weight each had in the loss that was backpropagated:

    * `loss_weights="sum"`: `losses.sum().backward()`. For any other loss, what it gives are the
      norms of contributions to it;
    * `loss_weights="mean"`: `losses.mean().backward()`, with all samples of the batch in each pass;
    * `loss_weights="given"`: weights come with each batch, `engine.batch(ids, loss_weights=w)` for
      `(w * losses).sum().backward()`. So it is with losses that are means over all tokens of
      samples of different lengths, and with micro-batches that are divided by their number.

    Nothing tells a wrong weight from a right one; `w` scales the norm.

    Squared norms of a parameter that is used several times need the products of all uses, so the
    gradients of a batch are held until it is closed: as many bytes as the inputs and output
    gradients of all tracked modules, or as the built gradients, whichever is less for a parameter.
    Open a batch for each micro-batch to hold less.

    It takes the options of `HoldingEngine`.
    """

    def on_end(self, batch: Batch[Norms]) -> Norms:
        """Return the norms."""
        squared = self.held.squared_norms(batch.n)
        divisors = self.divisors(batch, torch.stack(list(squared.values())).sum(0)).square()
        own = {
            name: (values.double() / divisors.to(values.device)).to(values.dtype)
            for name, values in squared.items()
        }
        return Norms(batch.ids, own, batch.verified)


@dataclass(frozen=True, kw_only=True)
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

    @property
    def cosine(self) -> Tensor:
        """Cosines of whole gradients with whole directions, `[N, K]`.

        NaN where a norm is zero or not finite.
        """
        norms, others = self.squared_norms.values(), self.squared_direction_norms.values()
        return cosines(
            self.total, torch.stack(list(norms)).sum(0), torch.stack(list(others)).sum(0)
        )

    @property
    def cosine_by_layer(self) -> dict[str, Tensor]:
        """Cosines of the parts that belong to one layer, `[N, K]`; they do not add up."""
        norms, others = by_layer(self.squared_norms), by_layer(self.squared_direction_norms)
        return {
            name: cosines(dots, norms[name], others[name]) for name, dots in self.by_layer.items()
        }


class CosineBatch(ScoredBatch):
    """A batch that is being scored, cosines included."""

    @property
    def result(self) -> Cosines:
        """Dots, norms and cosines; see `Batch.result`."""
        result = super().result
        assert isinstance(result, Cosines)
        return result

    @property
    def cosine(self) -> Tensor:
        """Cosines of whole gradients with whole directions, `[N, K]`."""
        return self.result.cosine

    @property
    def cosine_by_layer(self) -> dict[str, Tensor]:
        """Cosines by layer, `[N, K]`."""
        return self.result.cosine_by_layer


class CosineEngine(DotProductEngine):
    """Scores every training sample by its angle with directions, and by dots as its base does.

    It takes the options of `DotProductEngine`, of which it has all else as well: directions,
    observers such as `InRunValues`, scores. Norms need the gradients of a batch until it is closed:
    see `NormEngine`.
    """

    @contextmanager
    def batch(
        self, ids: SampleIds, *, owners: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Iterator[CosineBatch]:
        """Score the samples of one batch; see `Engine.batch`.

        Yields:
            The batch, whose scores and cosines are there once it is closed.
        """
        with super().batch(ids, owners=owners) as batch:
            assert isinstance(batch, CosineBatch)
            yield batch

    def new_batch(self, ids: Tensor) -> CosineBatch:
        """Return a batch with cosines."""
        return CosineBatch(ids, self.verifies)

    def on_start(self, batch: Batch[Scores]) -> None:
        """Renew the directions that are due, and hold nothing yet."""
        super().on_start(batch)
        self._held = HeldGradients(self.sites)

    def on_gradient(self, pass_: Pass, site: Site, gradient: PerSampleGradient) -> None:
        """Multiply with the directions, and hold the gradient."""
        super().on_gradient(pass_, site, gradient)
        self._held.add(pass_, site, gradient)

    def on_end(self, batch: Batch[Scores]) -> Cosines:
        """Return dots and norms."""
        squared = {
            name: values / self.loss_scale / self.loss_scale
            for name, values in self._held.squared_norms(batch.n).items()
        }
        of_directions = {
            name: torch.linalg.vector_norm(as_rows(stacked), dim=1).square()
            for name, stacked in self._stacked.items()
        }
        scores = super().on_end(batch)
        return Cosines(
            **{field.name: getattr(scores, field.name) for field in fields(scores)},
            squared_norms=squared,
            squared_direction_norms=of_directions,
        )

    def on_close(self) -> None:
        """Let go of sums and gradients."""
        super().on_close()
        self._held = HeldGradients(())
