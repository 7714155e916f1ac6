"""Pairs of rows that are nearly the same."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ghost_core.algebra import accumulation_dtype, full_precision
from ghost_core.arguments import whole
from ghost_core.tracking import Patterns
from ghost_engines.progress import Progress
from ghost_engines.store import (
    GradientStore,
    StoreError,
    check_store,
    columns_of,
    device_of,
    number,
    unit_length,
)


@dataclass(frozen=True, repr=False)
class Pairs:
    """Pairs of rows, each once, in order of their ordinals.

    Attributes:
        scores: Cosines `[M]`, float32 or float64.
        ids: Sample ids, int64 `[M, 2]`.
        ordinals: Positions in the store, the lower one first, int64 `[M, 2]`.
    """

    scores: Tensor
    ids: Tensor
    ordinals: Tensor

    def __len__(self) -> int:
        """Return the number of pairs M."""
        return len(self.scores)

    def __repr__(self) -> str:
        """Say how many there are."""
        return f"{type(self).__name__}({len(self)})"


def near_duplicates(
    store: GradientStore,
    threshold: float,
    *,
    most: int = 1_000_000,
    parameters: Patterns | None = None,
    device: torch.device | str = "cpu",
    block: int = 4096,
    progress: bool | None = None,
) -> Pairs:
    """Find all pairs of rows with a cosine of at least a threshold.

    Compares every row with every other one, two blocks at a time: N² / 2 products, and memory for
    two blocks, their scores and what was found. Cosines are rounded as those of a search are, and
    the threshold is lowered by what rounding can take from one: with 1, equal rows are found.

    Args:
        store: The store.
        threshold: The least cosine, above 0 and at most 1. A row of zeros is in no pair.
        most: The most pairs to find.
        parameters: Globs over names of modules and parameters: whose columns to compare.
        device: Where to compute.
        block: Rows of a block.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Raises:
        UnknownNameError: If a glob matches nothing.
        StoreError: If the threshold is none, or there are more pairs.
        DamagedStoreError: If a file went missing or was altered.
    """
    check_store(store)
    threshold, device = number("threshold", threshold), device_of(device)
    if not 0 < threshold <= 1:
        raise StoreError(f"threshold must be above 0 and at most 1, not {threshold}")
    block = whole("the rows of a block", block, least=1, error=StoreError)
    most = whole("most", most, least=1, error=StoreError)
    columns = columns_of(store.manifest, parameters)
    dtype, n = accumulation_dtype(store.dtype), len(store)

    def unit(start: int) -> Tensor:
        rows = store.rows(start, min(start + block, n))[:, columns]
        return unit_length(rows.to(device, dtype))

    found: list[tuple[Tensor, Tensor]] = []
    taken = 0
    with full_precision(device), Progress(n, "near duplicates", progress) as bar:
        for first in range(0, n, block):
            left = unit(first)
            least = threshold * (1 - _rounding(left))
            for second in range(first, n, block):
                scores = left @ (left if second == first else unit(second)).mT
                pairs = (scores.triu_(1) if second == first else scores) >= least
                taken += int(pairs.sum())
                if taken > most:
                    raise StoreError(
                        f"more than {most} pairs have a cosine of at least {threshold}",
                        reason="what is found is kept in memory",
                        remedy="raise the threshold, or most",
                    )
                at = pairs.nonzero()
                found.append((scores[pairs].cpu(), at.cpu() + torch.tensor([first, second])))
            bar.advance(len(left))
    return _in_order(found, store, dtype)


def _in_order(
    found: list[tuple[Tensor, Tensor]], store: GradientStore, dtype: torch.dtype
) -> Pairs:
    """Return pairs in order of their ordinals."""
    none = torch.empty(0, dtype=dtype), torch.empty(0, 2, dtype=torch.int64)
    scores, ordinals = (torch.cat(parts) for parts in zip(none, *found, strict=True))
    order = (ordinals[:, 0] * max(len(store), 1) + ordinals[:, 1]).argsort()
    ordinals = ordinals[order]
    return Pairs(scores[order], store.ids[ordinals], ordinals)


def _rounding(rows: Tensor) -> float:
    """Return how far from 1 the product of a row of length 1 with itself may be.

    Each factor is off by a few eps, and the errors of c products add up as the root of c.
    """
    return (4 + sqrt(rows.shape[1])) * torch.finfo(rows.dtype).eps
