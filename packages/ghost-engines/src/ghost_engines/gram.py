"""Inner products and cosines between the gradients of samples, in a batch or with a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from ghost_core import Batch, CaptureError, SampleIds
from ghost_engines.held import HeldGradients
from ghost_engines.holding import HoldingEngine
from ghost_engines.results import SummedResult, cosines, summed


@dataclass(frozen=True, kw_only=True, repr=False)
class Between(SummedResult):
    """Inner products `⟨g_n, h_m⟩`, `[N, M]`, of a batch's gradients with those of a reference.

    Attributes:
        reference_ids: Ids of the reference's samples, int64 `[M]`.
        squared_norms: `‖g_n‖²` over all parameters, `[N]`.
        reference_squared_norms: `‖h_m‖²` over all parameters, `[M]`.
    """

    reference_ids: Tensor
    squared_norms: Tensor
    reference_squared_norms: Tensor

    @property
    def cosines(self) -> Tensor:
        """Cosines between whole gradients, `[N, M]`; NaN as in `Gram.cosines`."""
        squared = self.squared_norms
        return cosines(self.total, squared, self.reference_squared_norms.to(squared.device))

    def _facts(self) -> list[str]:
        return [*super()._facts(), f"M={len(self.reference_ids)}"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Gram(SummedResult):
    """Inner products `⟨g_n, g_m⟩`, `[N, N]`, between the gradients of the samples' own losses.

    Values are float32, or float64 where a parameter is. A sample whose loss had weight zero has
    NaN: its own gradient did not take part in the backward pass. `verified` is of the reference
    too.

    Attributes:
        reference: What `between` returns; None if there was no reference.
    """

    reference: Between | None = None

    @property
    def cosines(self) -> Tensor:
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
    def between(self) -> Between:
        """Inner products with the samples of the reference.

        Raises:
            CaptureError: If there was no reference.
        """
        if self.reference is None:
            raise CaptureError(
                "there was no reference when the batch was closed, or it was the reference itself: "
                "with engine.reference(ids): ..."
            )
        return self.reference

    def _facts(self) -> list[str]:
        reference = [] if self.reference is None else [f"M={len(self.reference.reference_ids)}"]
        return [*super()._facts(), *reference]


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
    batch.result.between.cosine  # [N, M]
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
        divisors = self.divisors(batch, summed(grams).diagonal())
        own = _divided(grams, divisors, divisors)
        gram = Gram(ids=batch.ids, verified=batch.verified, by_parameter=own)
        squared_norms = gram.total.diagonal()
        if self._keeping:
            self._keep(batch, divisors, squared_norms)
        if self._keeping or self._kept is None:
            return gram
        kept = self._kept
        products = self.held.gram_with(kept.held, batch.n, len(kept.ids))
        between = Between(
            ids=batch.ids,
            verified=batch.verified and kept.verified,
            by_parameter=_divided(products, divisors, kept.divisors),
            reference_ids=kept.ids,
            squared_norms=squared_norms,
            reference_squared_norms=kept.squared_norms,
        )
        return replace(gram, verified=between.verified, reference=between)

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


def _divided(products: Mapping[str, Tensor], divisors: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Divide products `[N, M]` by weights of rows and of columns."""
    return {
        name: (values.double() / divisors.to(values.device)[:, None] / others.to(values.device)).to(
            values.dtype
        )
        for name, values in products.items()
    }
