"""Scores that are added up over several stores, as of the checkpoints of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost_core.tracking import Patterns
from ghost_engines.store import By, GradientStore, Neighbours, Queries, Scan, best

Stores = GradientStore | Sequence[GradientStore]
"""A store; or several of the same samples in the same order, such as those of checkpoints."""


@dataclass(frozen=True, repr=False)
class RowScores:
    """Scores of all rows.

    Attributes:
        ids: Sample ids in order of the rows, int64 `[N]`.
        scores: `[Q, N]`, float32 or float64.
    """

    ids: Tensor
    scores: Tensor

    def __repr__(self) -> str:
        """Say how many there are."""
        q, n = self.scores.shape
        return f"{type(self).__name__}(Q={q}, N={n})"


def scan_of(
    stores: Stores,
    queries: Queries | Sequence[Queries],
    *,
    by: By | Sequence[By],
    weights: Sequence[float] | None,
    row_weights: Tensor | None = None,
    parameters: Patterns | None,
    device: torch.device | str | None,
    block: int,
) -> Scan:
    """Compare the rows of one store or of several with queries, as `search` does."""
    if isinstance(stores, GradientStore):
        stores, queries = [stores], [queries]  # type: ignore[list-item] # those of the one store
    return Scan(
        stores, queries, by=by, weights=weights, row_weights=row_weights, parameters=parameters,  # type: ignore[arg-type]
        device=device, block=block,
    )  # fmt: skip


def search(
    stores: Stores,
    queries: Queries | Sequence[Queries],
    k: int = 10,
    by: By | Sequence[By] = "dot",
    *,
    weights: Sequence[float] | None = None,
    row_weights: Tensor | None = None,
    largest: bool = True,
    parameters: Patterns | None = None,
    device: torch.device | str | None = None,
    block: int = 4096,
    progress: bool | None = None,
) -> Neighbours:
    """Find the best rows for each query by scores that are added up over several stores.

    With the stores of checkpoints and their learning rates as weights, dot products are TracInCP
    (Pruthi et al., 2020) and cosines of Adam-aware queries LESS (Xia et al., 2024); with those of
    models that were trained apart, whitened products of the gradients of margins are an ensemble as
    in TRAK (Park et al., 2023), whose Q, one minus the probability of each sample's own label, are
    row weights.

    Args:
        stores: Stores of the same samples in the same order; or one.
        queries: For each store the queries of its model, all of the same Q: `[Q, k_total]` or what
            an engine collected.
        k: How many rows to find for each query.
        by: `dot`, `cosine` or a `Whitening`; or a list with one for each store. Each store's
            whitening is its own.
        weights: What the scores of each store are multiplied with; by default 1.
        row_weights: What the scores of each row are multiplied with, once they are added up over
            the stores, `[N]` in order of the rows; by default 1.
        largest: Whether the largest scores are the best, or the smallest.
        parameters: Globs over names of modules and parameters: whose columns to compare.
        device: Where to compute; by default where the queries are.
        block: Rows to compare at once.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Returns:
        Scores, ids and ordinals, each `[Q, min(k, len)]`, best first; of equal ones the lower
        ordinal first.

    Raises:
        UnknownNameError: If a metric does not exist, or a glob matches nothing.
        StoreError: If the stores hold different samples, or something else does not fit.
        DamagedStoreError: If a file went missing or was altered.
    """
    scan = scan_of(
        stores, queries, by=by, weights=weights, row_weights=row_weights, parameters=parameters,
        device=device, block=block,
    )  # fmt: skip
    return best(scan, k, largest=largest, progress=progress)


def scores(
    stores: Stores,
    queries: Queries | Sequence[Queries],
    by: By | Sequence[By] = "dot",
    *,
    weights: Sequence[float] | None = None,
    row_weights: Tensor | None = None,
    parameters: Patterns | None = None,
    device: torch.device | str | None = None,
    block: int = 4096,
    progress: bool | None = None,
) -> RowScores:
    """Return the scores of all rows, which take 4 Q N bytes, or 8 in float64.

    Args:
        stores: As for `search`.
        queries: As for `search`.
        by: As for `search`.
        weights: As for `search`.
        row_weights: As for `search`.
        parameters: As for `search`.
        device: As for `search`; what is returned is there.
        block: As for `search`.
        progress: As for `search`.

    Raises:
        UnknownNameError: If a metric does not exist, or a glob matches nothing.
        StoreError: If the stores hold different samples, or something else does not fit.
        DamagedStoreError: If a file went missing or was altered.
    """
    scan = scan_of(
        stores, queries, by=by, weights=weights, row_weights=row_weights, parameters=parameters,
        device=device, block=block,
    )  # fmt: skip
    ids = torch.empty(scan.n, dtype=torch.int64, device="cpu")
    table = torch.empty(scan.q, scan.n, dtype=scan.dtype, device=scan.device)
    for start, those, found in scan.scores("scores", progress):
        ids[start : start + len(those)] = those
        table[:, start : start + len(those)] = scan.unscaled(found)
    return RowScores(ids, table)
