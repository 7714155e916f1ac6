"""Norms of per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ghost_core import Batch
from ghost_engines.holding import HoldingEngine
from ghost_engines.results import Result, by_layer, summed


@dataclass(frozen=True, kw_only=True, repr=False)
class Norms(Result):
    """Norms of the gradients of a batch: of each sample's own loss.

    Values are float32, or float64 where a parameter is. A sample whose loss had weight zero has
    NaN: its own gradient did not take part in the backward pass.

    Attributes:
        squared: Squared norms by parameter name, `[N]`.
    """

    squared: Mapping[str, Tensor]

    @property
    def total(self) -> Tensor:
        """Norms of whole gradients, `[N]`."""
        return summed(self.squared).sqrt()

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

    def _facts(self) -> list[str]:
        return [*super()._facts(), f"{len(self.squared)} parameters"]


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
        divisors = self.divisors(batch, summed(squared)).square()
        own = {
            name: (values.double() / divisors.to(values.device)).to(values.dtype)
            for name, values in squared.items()
        }
        return Norms(ids=batch.ids, verified=batch.verified, squared=own)
