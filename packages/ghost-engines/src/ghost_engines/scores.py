"""What the dot products of a batch say: by sample, by parameter, by token, by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ghost_core import Batch, CaptureError, Pass

DocumentIds = Sequence[Sequence[int] | Tensor | np.ndarray] | Tensor | np.ndarray

_LISTED = 10
"""How many parameters an error lists by name."""


@dataclass(frozen=True)
class SegmentScores:
    """Dot products of documents: of what each contributed to a batch, with each direction.

    Attributes:
        ids: Document ids, int64 `[S]` on the CPU, sorted, each once.
        directions: Names of the K directions.
        dots: Dots of the S documents, float64 `[S, K]` on the CPU.
        outside: Dots of all positions that belong to no document, float64 `[K]` on the CPU; with
            it, `dots` sum to those of the batch.
        verified: Whether the split by sample was verified on this model.
    """

    ids: Tensor
    directions: tuple[str, ...]
    dots: Tensor
    outside: Tensor
    verified: bool


@dataclass(frozen=True)
class Scores:
    """Dot products of a batch: of each sample's contribution with each direction.

    A sample's contribution is its additive part of the gradient that was backpropagated. A
    positive dot with the gradient of a validation loss means that a small step along the sample's
    contribution lowers that loss.

    Attributes:
        ids: Sample ids, int64 `[N]`.
        directions: Names of the K directions.
        by_parameter: `[N, K]` by parameter name.
        verified: Whether the split by sample was verified on this model.
        token_dots: What `by_token` returns; None if the engine was made without `per_token=True`.
    """

    ids: Tensor
    directions: tuple[str, ...]
    by_parameter: Mapping[str, Tensor]
    verified: bool
    token_dots: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Dots of whole gradients, `[N, K]`."""
        return torch.stack(list(self.by_parameter.values())).sum(0)

    @property
    def finite(self) -> Tensor:
        """Which samples have finite dots, bool `[N]`: all of them, unless gradients overflowed."""
        return self.total.isfinite().all(1)

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Dots by layer, `[N, K]`: the sum over the parameters that one module owns.

        A parameter shared by modules counts for the first of them.
        """
        return by_layer(self.by_parameter)

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
        return SegmentScores(ids, self.directions, sums, dots[~inside].sum(0), self.verified)


class ScoredBatch(Batch[Scores]):
    """A batch that is being scored; the scores are there once it is closed."""

    @property
    def scores(self) -> Tensor:
        """Dots of whole gradients, `[N, K]`."""
        return self.result.total

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Dots by layer, `[N, K]`."""
        return self.result.by_layer

    @property
    def by_parameter(self) -> Mapping[str, Tensor]:
        """Dots by parameter, `[N, K]`."""
        return self.result.by_parameter

    @property
    def by_token(self) -> Tensor:
        """Dots by token, `[N, T, K]`; see `Scores.by_token`."""
        return self.result.by_token

    def by_segment(self, document_ids: DocumentIds) -> SegmentScores:
        """Dots by document, for ids `[N, T]`; see `Scores.by_segment`."""
        return self.result.by_segment(document_ids)


class ScoreObserver(Protocol):
    """Follows the batches of a `DotProductEngine`."""

    def starting(self) -> None:
        """A batch is about to be captured."""
        ...

    def scored(self, scores: Scores) -> None:
        """A batch was scored."""
        ...


def by_layer(by_parameter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum over the parameters that one module owns.

    A parameter shared by modules counts for the first of them.
    """
    layers: dict[str, Tensor] = {}
    for name, values in by_parameter.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers[layer] + values if layer in layers else values
    return layers


class TokenSum:
    """Adds up dots by token over the parameters and passes of a batch.

    Args:
        zeros: Dots of a batch without tokens, `[N, 0, K]`, which say dtype and device.
    """

    def __init__(self, zeros: Tensor) -> None:
        self._sum = zeros
        self._passes: list[tuple[Pass, dict[int, dict[str, None]]]] = []

    def add(self, pass_: Pass, parameter: str, dots: Tensor) -> None:
        """Add the dots `[N, T, K]` of one use of a parameter."""
        tokens = dots.shape[1]
        if not self._passes:
            self._sum = self._sum.new_zeros(len(self._sum), tokens, self._sum.shape[2])
        self._seen(pass_).setdefault(tokens, {})[parameter] = None
        if self._sum.shape[1] == tokens:  # else `total` raises
            self._sum[pass_.rows] += dots

    def total(self) -> Tensor:
        """Return the sums, `[N, T, K]`.

        Raises:
            CaptureError: If parameters or passes have different numbers of tokens.
        """
        for _, seen in self._passes:
            if len(seen) > 1:
                raise _different_tokens(seen)
        lengths = sorted({tokens for _, seen in self._passes for tokens in seen})
        if len(lengths) > 1:
            raise CaptureError(
                "gradients cannot be split by token: the passes of this batch had different "
                f"numbers of tokens, {', '.join(map(str, lengths))}",
                reason="position t of one need not be position t of another",
                remedy="pad them to one length, or open a batch for each pass",
            )
        return self._sum

    def _seen(self, pass_: Pass) -> dict[int, dict[str, None]]:
        """Return the parameters that a pass used, by their number of tokens."""
        for other, seen in self._passes:
            if other is pass_:
                return seen
        self._passes.append((pass_, {}))
        return self._passes[-1][1]


def _different_tokens(seen: Mapping[int, Mapping[str, None]]) -> CaptureError:
    """Say which parameters have another number of tokens than most have."""
    usual = max(seen, key=lambda tokens: (tokens > 1, len(seen[tokens]), tokens))
    others = {tokens: sorted(names) for tokens, names in sorted(seen.items()) if tokens != usual}
    counts = ", ".join(f"{_listed(names)}: {tokens}" for tokens, names in others.items())
    left_out = sorted({name for names in others.values() for name in names})
    return CaptureError(
        f"gradients cannot be split by token: most parameters have {usual} tokens, such as "
        f"{min(seen[usual])}, but not these: {counts}",
        reason="a parameter that was used once for a whole sample (1 token), in a layer that "
        "cannot tell tokens apart (1), or at other positions has no part at each token",
        remedy=f"leave them out with exclude={','.join(left_out)!r}, or make the engine without "
        "per_token=True",
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


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
