"""What the dot products of a batch say: by sample, by parameter, by token, by document."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ghost_core import CaptureError
from ghost_engines.results import Result, SummedResult, by_layer, cosines, summed

DocumentIds = Sequence[Sequence[int] | Tensor | np.ndarray] | Tensor | np.ndarray


@dataclass(frozen=True, kw_only=True, repr=False)
class SegmentScores(Result):
    """Dot products of documents: of what each contributed to a batch, with each direction.

    Attributes:
        ids: Document ids, int64 `[S]` on the CPU, sorted, each once.
        directions: Names of the K directions.
        total: Dots of the S documents, float64 `[S, K]` on the CPU.
        outside: Dots of all positions that belong to no document, float64 `[K]` on the CPU; with
            it, `total` sums to that of the batch.
    """

    directions: tuple[str, ...]
    total: Tensor
    outside: Tensor

    def _facts(self) -> list[str]:
        return [f"S={len(self.ids)}", _columns(self.directions)]


@dataclass(frozen=True, kw_only=True, repr=False)
class Scores(SummedResult):
    """Dot products of a batch, `[N, K]`: of each sample's contribution with each direction.

    A sample's contribution is its additive part of the gradient that was backpropagated. A
    positive dot with the gradient of a validation loss means that a small step along the sample's
    contribution lowers that loss.

    Attributes:
        directions: Names of the K directions.
        token_dots: What `by_token` returns; None if the engine was made without `per_token=True`.
        squared_norms: Squared norms of contributions by parameter name, `[N]`; None if the engine
            was made without `norms=True`.
        squared_direction_norms: Squared norms of directions by parameter name, `[K]`, likewise.
    """

    directions: tuple[str, ...]
    token_dots: Tensor | None = None
    squared_norms: Mapping[str, Tensor] | None = None
    squared_direction_norms: Mapping[str, Tensor] | None = None

    @property
    def finite(self) -> Tensor:
        """Which samples have finite dots, bool `[N]`: all of them, unless gradients overflowed."""
        return self.total.isfinite().all(1)

    @property
    def by_token(self) -> Tensor:
        """Dots by token, `[N, T, K]`; their sum over T is `total`, up to rounding.

        The dot of token t belongs to the part of the sample's contribution that arrived through the
        layers' computation *at* position t. That is not the gradient of the token's loss: through
        attention, the losses of other tokens reach position t too, and its own reaches others.

        Positions are those of the layers' own inputs, all axes between samples and features in
        order. They are matched by their number: position t of one layer is taken for position t
        of another. Where passes were further uses of the same samples, their positions add up.

        Raises:
            CaptureError: If the engine was made without `per_token=True`.
        """
        if self.token_dots is None:
            raise CaptureError(
                "dots were not kept by token: make the engine with DotProductEngine(model, "
                "per_token=True)"
            )
        return self.token_dots

    @property
    def norms(self) -> Tensor:
        """Norms of whole contributions, `[N]`.

        Raises:
            CaptureError: If the engine was made without `norms=True`.
        """
        return summed(self._norms()[0]).sqrt()

    @property
    def norms_by_parameter(self) -> dict[str, Tensor]:
        """Norms of contributions by parameter, `[N]`; see `norms`."""
        return {name: squared.sqrt() for name, squared in self._norms()[0].items()}

    @property
    def cosines(self) -> Tensor:
        """Cosines of whole contributions with whole directions, `[N, K]`.

        The weight of a sample's loss cancels out, as long as it is positive. NaN where a norm is
        zero or not finite.

        Raises:
            CaptureError: If the engine was made without `norms=True`.
        """
        mine, others = self._norms()
        return cosines(self.total, summed(mine), summed(others))

    @property
    def cosines_by_parameter(self) -> dict[str, Tensor]:
        """Cosines of the parts that belong to one parameter, `[N, K]`; they do not add up."""
        mine, others = self._norms()
        return {
            name: cosines(dots, mine[name], others[name])
            for name, dots in self.by_parameter.items()
        }

    @property
    def cosines_by_layer(self) -> dict[str, Tensor]:
        """Cosines of the parts that belong to one layer, `[N, K]`; they do not add up."""
        mine, others = (by_layer(each) for each in self._norms())
        return {
            name: cosines(dots, mine[name], others[name]) for name, dots in self.by_layer.items()
        }

    def _norms(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        if self.squared_norms is None or self.squared_direction_norms is None:
            raise CaptureError(
                "norms were not taken: make the engine with DotProductEngine(model, norms=True)"
            )
        return self.squared_norms, self.squared_direction_norms

    def by_segment(self, document_ids: DocumentIds) -> SegmentScores:
        """Add up the dots of each document's positions, for samples packed of several documents.

        If documents do not touch in the model (attention has a block-diagonal mask, and nothing
        else carries values from one to another), this is the dot of the gradient of the losses at
        the document's positions, as they were weighted in the batch's loss. Else it is the
        document's share by position; see `by_token`.

        Args:
            document_ids: The document that each position belongs to, integers `[N, T]`; negative
                for none, such as padding. A document in several places or samples adds up.

        Returns:
            One row for each document.

        Raises:
            CaptureError: If the engine was made without `per_token=True`, or `document_ids` are
                not integers `[N, T]`.
        """
        dots = self.by_token.to("cpu", torch.float64).flatten(0, 1)  # [N·T, K]
        documents = _as_integers(document_ids, self.by_token.shape[:2]).flatten()
        inside = documents >= 0
        ids, segment = documents[inside].unique(return_inverse=True)
        sums = dots.new_zeros(len(ids), dots.shape[1]).index_add_(0, segment, dots[inside])
        return SegmentScores(
            ids=ids,
            verified=self.verified,
            directions=self.directions,
            total=sums,
            outside=dots[~inside].sum(0),
        )

    def _facts(self) -> list[str]:
        return [*super()._facts(), _columns(self.directions)]


def _columns(directions: Sequence[str]) -> str:
    return f"K={len(directions)} ({reprlib.repr(', '.join(directions))[1:-1]})"


def _as_integers(document_ids: DocumentIds, shape: Sequence[int]) -> Tensor:
    """Return document ids as int64 `[N, T]` on the CPU."""
    wanted = f"document_ids must be integers [N, T] = {list(shape)}"
    if isinstance(document_ids, Tensor):
        kind, values = str(document_ids.dtype), document_ids.detach().cpu()
        if values.is_floating_point() or values.is_complex():
            raise CaptureError(f"{wanted}, not {kind}")
        array = values.numpy()
    else:
        try:
            array = np.asarray(document_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CaptureError(f"{wanted}: {error}") from error
        kind = str(array.dtype)
    if array.dtype.kind not in "iu" or array.shape != tuple(shape):
        raise CaptureError(f"{wanted}, not {kind} of shape {list(array.shape)}")
    if array.dtype == np.uint64 and (array > np.iinfo(np.int64).max).any():
        raise CaptureError(f"{wanted} that fit into int64")
    return torch.from_numpy(array.astype(np.int64))
