"""Exact search: the best of all rows for each query, found block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghost_core.arguments import switch, whole
from ghost_engines.store.errors import StoreError
from ghost_engines.store.scan import Scan


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


def best(scan: Scan, k: int, *, largest: bool = True, progress: bool | None = None) -> Neighbours:
    """Find the best rows for each query.

    Args:
        scan: What the scores are.
        k: How many rows to find for each query. If there are fewer, all are returned.
        largest: Whether the largest scores are the best, or the smallest.
        progress: Whether to show a progress bar.

    Raises:
        CaptureError: If `largest` is no switch.
        StoreError: If `k` is not positive or a score overflows or underflows.
    """
    k = whole("k", k, least=1, error=StoreError)
    smallest = not switch("largest", largest)
    found = _nothing(scan.q, min(k, scan.n), scan.dtype, scan.device)
    least = found.scores[:, -1:]  # changes with what is found
    for ordinals, ids, scores in scan.above(least, "search", progress, smallest=smallest):
        _update(found, scores, ids, ordinals)
    if smallest:
        found.scores.neg_().add_(0)  # no zero keeps its sign
    return replace(found, scores=scan.unscaled(found.scores))


def _nothing(q: int, k: int, dtype: torch.dtype, device: torch.device) -> Neighbours:
    """Return neighbours that every row is better than."""
    ids = torch.full((q, k), -1, device=device)
    return Neighbours(torch.full((q, k), -torch.inf, dtype=dtype, device=device), ids, ids.clone())


def _update(best: Neighbours, scores: Tensor, ids: Tensor, ordinals: Tensor) -> None:
    """Put what is better among the scores of later rows `[Q, n]` in place of the best so far."""
    if not scores.numel():
        return
    # They come after those so far, which therefore keep their places at equal scores.
    worst = best.scores[:, -1:]
    changing = (scores.amax(dim=1) > worst[:, 0]).nonzero().flatten()
    if not len(changing):
        return
    scores, worst = scores[changing], worst[changing]
    entering = int((scores > worst).sum(dim=1).max())
    if entering > best.ids.shape[1]:  # as in the first block: of these, the best k and their equals
        least = scores.topk(best.ids.shape[1], dim=1).values[:, -1:]
        entering = int((scores >= least.maximum(worst)).sum(dim=1).max())
    # Of equal scores topk takes any, but here it takes all that enter; the others come last.
    candidates = scores.topk(entering, dim=1).indices.sort(dim=1).values
    all_scores = torch.cat([best.scores[changing], scores.gather(1, candidates)], dim=1)
    ids, ordinals = (each.to(scores.device)[candidates] for each in (ids, ordinals))
    all_ids = torch.cat([best.ids[changing], ids], dim=1)
    all_ordinals = torch.cat([best.ordinals[changing], ordinals], dim=1)
    order = all_scores.sort(dim=1, descending=True, stable=True).indices[:, : best.ids.shape[1]]
    best.scores[changing] = all_scores.gather(1, order)
    best.ids[changing] = all_ids.gather(1, order)
    best.ordinals[changing] = all_ordinals.gather(1, order)
