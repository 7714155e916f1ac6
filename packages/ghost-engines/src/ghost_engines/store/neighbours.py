"""Exact search: every row is compared with every query, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from ghost_core import UnknownNameError
from ghost_core.algebra import accumulation_dtype, full_precision
from ghost_core.arguments import whole
from ghost_engines.progress import Progress
from ghost_engines.store.errors import StoreError
from ghost_engines.store.rows import StoredRows

METRICS = ("cosine", "dot")
"""How a row can be compared with a query."""


_SHORTEST = 1e-12
"""Length of rows whose squares are added up in float32 without a loss, and 1 / it the longest."""


@dataclass(frozen=True, repr=False)
class Neighbours:
    """The best rows for each query, best first; of equal scores the lower ordinal first.

    Attributes:
        scores: `[Q, k]`, float32 or float64.
        ids: Sample ids, int64 `[Q, k]`.
        ordinals: Positions in the store, int64 `[Q, k]`.
    """

    scores: Tensor
    ids: Tensor
    ordinals: Tensor

    def __repr__(self) -> str:
        """Say how many there are."""
        (q, k), dtype = self.scores.shape, str(self.scores.dtype).removeprefix("torch.")
        return f"{type(self).__name__}(Q={q}, k={k}, {dtype})"


class RowReader(Protocol):
    """What a search needs of a store."""

    @property
    def k_total(self) -> int:
        """Number of columns of a row."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""

    def __len__(self) -> int:
        """Return the number of rows."""


def search(
    store: RowReader,
    blocks: Iterable[StoredRows],
    queries: Tensor,
    *,
    k: int,
    metric: str,
    progress: bool | None,
) -> Neighbours:
    """Find the best rows for each query; `GradientStore.search` says how.

    Args:
        store: What the rows are, and how many.
        blocks: All rows in order, some at a time.
        queries: `[Q, k_total]`.
        k: How many rows to find for each.
        metric: How rows are compared with queries.
        progress: Whether to show a progress bar.

    Raises:
        UnknownNameError: If the metric does not exist.
        StoreError: If a shape does not fit or a score is not finite.
    """
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    k = whole("k", k, least=1, error=StoreError)
    dtype = _check_queries(store, queries)
    best = _nothing(len(queries), min(k, len(store)), dtype, queries.device)
    start = 0
    with full_precision(queries.device), Progress(len(store), "search", progress) as bar:
        compared = queries.to(dtype)
        if metric == "cosine":
            compared = _unit_length(_without_zeros(compared))
        room = torch.empty(0, store.k_total, dtype=dtype, device=queries.device)
        for found in blocks:
            if len(room) < len(found):  # made once, as new memory costs as much as what is done
                room = torch.empty(len(found), store.k_total, dtype=dtype, device=queries.device)
            rows = room[: len(found)].copy_(found.rows)
            scores = _cosines(compared, rows) if metric == "cosine" else compared @ rows.mT
            _update(best, scores, found.ids, start)
            start += len(found)
            bar.advance(len(found))
    return best


def _check_queries(store: RowReader, queries: Tensor) -> torch.dtype:
    """Return the dtype to compute in."""
    if not isinstance(queries, Tensor):
        raise StoreError(
            f"queries must be a tensor [Q, {store.k_total}] or rows such as engine.collect(), not "
            f"{type(queries).__name__}"
        )
    if queries.dim() != 2 or queries.shape[1] != store.k_total or not queries.is_floating_point():
        raise StoreError(
            f"queries must be floating point [Q, {store.k_total}], not {queries.dtype} of shape "
            f"{list(queries.shape)}"
        )
    finite = queries.detach().isfinite().all(dim=1)
    if not finite.all():
        raise StoreError(f"queries {(~finite).nonzero().flatten().tolist()} are not finite")
    return accumulation_dtype(store.dtype, queries.dtype)


def _nothing(q: int, k: int, dtype: torch.dtype, device: torch.device) -> Neighbours:
    """Return neighbours that every row is better than."""
    ids = torch.full((q, k), -1, device=device)
    return Neighbours(torch.full((q, k), -torch.inf, dtype=dtype, device=device), ids, ids.clone())


def _update(best: Neighbours, scores: Tensor, ids: Tensor, start: int) -> None:
    """Put what is better among a block's scores `[Q, B]` in place of the best so far."""
    if not len(scores):
        return
    highest = scores.amax(dim=1)
    if not (isfinite(highest.max().item()) and isfinite(scores.amin().item())):
        raise StoreError(
            f"scores overflow {scores.dtype}: scale the queries, give them as float64, or choose "
            'metric="cosine"'
        )
    # A block's rows come after those so far, which therefore keep their places at equal scores.
    worst = best.scores[:, -1:]
    changing = (highest > worst[:, 0]).nonzero().flatten()
    if not len(changing):
        return
    scores = scores[changing]
    entering = int((scores > worst[changing]).sum(dim=1).max())
    # Of equal scores topk takes any, but here it takes all that enter; the others come last.
    candidates = scores.topk(entering, dim=1).indices.sort(dim=1).values
    all_scores = torch.cat([best.scores[changing], scores.gather(1, candidates)], dim=1)
    all_ids = torch.cat([best.ids[changing], ids.to(scores.device)[candidates]], dim=1)
    all_ordinals = torch.cat([best.ordinals[changing], candidates + start], dim=1)
    order = all_scores.sort(dim=1, descending=True, stable=True).indices[:, : best.ids.shape[1]]
    best.scores[changing] = all_scores.gather(1, order)
    best.ids[changing] = all_ids.gather(1, order)
    best.ordinals[changing] = all_ordinals.gather(1, order)


def _without_zeros(queries: Tensor) -> Tensor:
    zero = (queries == 0).all(dim=1)
    if zero.any():
        raise StoreError(
            f"queries {zero.nonzero().flatten().tolist()} are zero: they have no cosine with a row"
        )
    return queries


def _cosines(queries: Tensor, rows: Tensor) -> Tensor:
    """Return the products of queries of length 1 with rows, each divided by its row's length."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if len(rows) and lengths.min() > _SHORTEST and lengths.max() < 1 / _SHORTEST:
        return (queries @ rows.mT).div_(lengths)
    return queries @ _unit_length(rows).mT


def _unit_length(rows: Tensor) -> Tensor:
    """Scale rows to length 1; rows of zeros stay.

    Squares of small gradients underflow, so the largest entry is taken out first.
    """
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True))
    scaled = rows / largest.where(largest > 0, 1)
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    unit: Tensor = scaled / lengths.where(lengths > 0, 1)
    return unit
