"""Inner products and cosines between the gradients of samples, in a batch or with a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from ghost_core import Batch, CaptureError, SampleIds
from ghost_engines.held import HeldGradients, cosines
from ghost_engines.holding import HoldingEngine
from ghost_engines.scores import by_layer


@dataclass(frozen=True)
class Between:
    """Inner products of a batch's gradients with those of a reference batch.

    Attributes:
        ids: Ids of the reference's samples, int64 `[M]`.
        by_parameter: `⟨g_n, h_m⟩` by parameter name, `[N, M]`.
        squared_norms: `‖h_m‖²` over all parameters, `[M]`.
    """

    ids: Tensor
    by_parameter: Mapping[str, Tensor]
    squared_norms: Tensor


@dataclass(frozen=True)
class Gram:
    """Inner products between the gradients of a batch: of the samples' own losses.

    Values are float32, or float64 where a parameter is. A sample whose loss had weight zero has
    NaN: its own gradient did not take part in the backward pass.

    Attributes:
        ids: Sample ids, int64 `[N]`.
        by_parameter: `⟨g_n, g_m⟩` by parameter name, `[N, N]`.
        verified: Whether the split by sample was verified on this model, for the reference too.
        reference: Products with the reference batch; None if there was none.
    """

    ids: Tensor
    by_parameter: Mapping[str, Tensor]
    verified: bool
    reference: Between | None = None

    @property
    def total(self) -> Tensor:
        """Inner products of whole gradients, `[N, N]`."""
        return _sum(self.by_parameter)

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Inner products by layer, `[N, N]`: the sum over the parameters that one module owns.

        A parameter shared by modules counts for the first of them.
        """
        return by_layer(self.by_parameter)

    @property
    def cosine(self) -> Tensor:
        """Cosines between whole gradients, `[N, N]`.

        They do not depend on the weights of losses, but for their signs. NaN where a gradient is
        zero or not finite.
        """
        total = self.total
        return cosines(total, total.diagonal(), total.diagonal())

    @property
    def finite(self) -> Tensor:
        """Which samples have finite products, bool `[N]`.

        All of them, unless gradients overflowed or a weight is zero.
        """
        return self.total.diagonal().isfinite()

    @property
    def between(self) -> Tensor:
        """Inner products with the samples of the reference, `[N, M]`.

        Raises:
            CaptureError: If there was no reference.
        """
        return _sum(self._reference.by_parameter)

    @property
    def between_by_layer(self) -> dict[str, Tensor]:
        """Inner products with the samples of the reference by layer, `[N, M]`.

        Raises:
            CaptureError: If there was no reference.
        """
        return by_layer(self._reference.by_parameter)

    @property
    def between_cosine(self) -> Tensor:
        """Cosines with the samples of the reference, `[N, M]`; NaN as in `cosine`.

        Raises:
            CaptureError: If there was no reference.
        """
        squared = self.total.diagonal()
        return cosines(self.between, squared, self._reference.squared_norms.to(squared.device))

    @property
    def reference_ids(self) -> Tensor:
        """Ids of the samples of the reference, int64 `[M]`.

        Raises:
            CaptureError: If there was no reference.
        """
        return self._reference.ids

    @property
    def _reference(self) -> Between:
        if self.reference is None:
            raise CaptureError(
                "there was no reference when the batch was closed, or it was the reference itself: "
                "with engine.reference(ids): ..."
            )
        return self.reference


@dataclass(frozen=True)
class _Reference:
    """A batch whose gradients are kept, and what divides them to be those of own losses."""

    ids: Tensor
    held: HeldGradients
    divisors: Tensor
    squared_norms: Tensor
    verified: bool


class GramEngine(HoldingEngine[Gram]):
    """Multiplies the gradients of samples with each other, from the training's own backward pass.

    Products are those of the gradients of the samples' own losses, so the engine must know which
    weight each had in the loss that was backpropagated: see `NormEngine`.

    A reference batch is one whose gradients are kept, to be multiplied with those of later ones:

    ```python
    with engine.reference(reference_ids):
        loss_fn(model, reference).backward()
    optimizer.zero_grad()  # its backward pass adds to .grad as any other
    with engine.batch(ids) as batch:
        loss_fn(model, data).backward()
    batch.result.between_cosine  # [N, M]
    ```

    A reference belongs to the parameters of its time. In training it grows old with each step;
    nothing renews it but another `reference`.

    The gradients of a batch are held until it is closed, in factors or built, whichever takes less
    memory; those of the reference until another replaces it or `clear_reference` is called, also
    when the engine is not attached. A result has N·N numbers for each parameter.

    It takes the options of `HoldingEngine`.
    """

    _kept: _Reference | None = None
    _keeping = False

    @property
    def has_reference(self) -> bool:
        """Whether the gradients of a reference batch are kept."""
        return self._kept is not None

    @contextmanager
    def reference(
        self,
        ids: SampleIds,
        *,
        owners: Mapping[str, Tensor] = MappingProxyType({}),
        loss_weights: float | Tensor | None = None,
    ) -> Iterator[Batch[Gram]]:
        """Capture a batch and keep its gradients, in place of those of another reference.

        If it fails, the reference is what it was before.

        Args:
            ids: One integer per sample, `[M]`.
            owners: As in `Engine.batch`.
            loss_weights: As in `batch`.

        Yields:
            The batch; its result has the products of the reference with itself.

        Raises:
            CaptureError: If gradients are not finite; and as `batch` does.
            WrongSplitError: If gradients cannot be split by sample.
        """
        with self.batch(ids, owners=owners, loss_weights=loss_weights) as batch:
            self._keeping = True
            yield batch

    def clear_reference(self) -> None:
        """Let go of the reference, if there is one."""
        self._kept = None

    def on_end(self, batch: Batch[Gram]) -> Gram:
        """Return the products, and keep the gradients of a reference."""
        grams = self.held.gram(batch.n)
        divisors = self.divisors(batch, _sum(grams).diagonal())
        own = _divided(grams, divisors, divisors)
        if self._keeping:
            self._keep(batch, divisors, _sum(own).diagonal())
            return Gram(batch.ids, own, batch.verified)
        if self._kept is None:
            return Gram(batch.ids, own, batch.verified)
        kept = self._kept
        products = self.held.gram_with(kept.held, batch.n, len(kept.ids))
        between = Between(kept.ids, _divided(products, divisors, kept.divisors), kept.squared_norms)
        return Gram(batch.ids, own, batch.verified and kept.verified, between)

    def on_close(self) -> None:
        """Let go of the gradients."""
        super().on_close()
        self._keeping = False

    def _keep(self, batch: Batch[Gram], divisors: Tensor, squared_norms: Tensor) -> None:
        wrong = ~squared_norms.isfinite()
        if wrong.any():
            raise CaptureError(
                f"the gradients of samples {batch.ids[wrong.cpu()].tolist()} are not finite, or "
                "their loss_weights are zero, so they are no reference"
            )
        self._kept = _Reference(
            batch.ids, self.held.copy(), divisors, squared_norms.clone(), batch.verified
        )


def _sum(by_parameter: Mapping[str, Tensor]) -> Tensor:
    """Sum over parameters, without another copy of all of them."""
    first, *others = by_parameter.values()
    total = first.clone()
    for values in others:
        total = total + values
    return total


def _divided(products: Mapping[str, Tensor], divisors: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Divide products `[N, M]` by weights of rows and of columns."""
    return {
        name: (values.double() / divisors.to(values.device)[:, None] / others.to(values.device)).to(
            values.dtype
        )
        for name, values in products.items()
    }
