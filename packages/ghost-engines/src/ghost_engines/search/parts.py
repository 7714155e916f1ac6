"""What each parameter adds to a score."""

from __future__ import annotations

import torch
from torch import Tensor

from ghost_core.algebra import full_precision
from ghost_core.tracking import Patterns
from ghost_engines.store import (
    By,
    GradientStore,
    Queries,
    Scorer,
    StoreError,
    check_store,
    overflow,
    parameter_columns,
    unit_length,
)


def score_parts(
    store: GradientStore,
    queries: Queries,
    ordinals: Tensor,
    by: By = "dot",
    *,
    parameters: Patterns | None = None,
) -> dict[str, Tensor]:
    """Take scores apart by parameter, for rows that a search found.

    Args:
        store: The store.
        queries: As for `search`, Q of them.
        ordinals: Positions of k rows for each query, int64 `[Q, k]`, as `Neighbours` have them.
        by: As for `search`. The parts of a cosine add up to it, and are no cosines themselves.
        parameters: As for `search`.

    Returns:
        By parameter `[Q, k]`; they add up to the scores, but for rounding.

    Raises:
        UnknownNameError: If a metric does not exist, or a glob matches nothing.
        StoreError: If something does not fit, or the manifest does not say which columns belong to
            which parameter.
        DamagedStoreError: If a file went missing or was altered.
    """
    check_store(store)
    places = parameter_columns(store.manifest)
    scorer = Scorer(store, queries, by, 1.0, parameters, None)
    asked = scorer.queries
    _check_ordinals(ordinals, len(asked))
    taken = torch.arange(store.k_total, device="cpu")[scorer.columns]
    found = {
        name: asked.new_zeros(ordinals.shape)
        for name, place in places.items()
        if bool(((taken >= place.start) & (taken < place.stop)).any())
    }
    with full_precision(asked.device):
        for at, those in enumerate(ordinals.tolist()):
            rows = [store.rows(ordinal, ordinal + 1)[:, scorer.columns] for ordinal in those]
            if not rows:
                continue
            products = torch.cat(rows).to(asked)
            products = asked[at] * (unit_length(products) if by == "cosine" else products)
            for name, part in found.items():
                place = places[name]
                here = (taken >= place.start) & (taken < place.stop)
                part[at] = products[:, here.to(products.device)].sum(1)
    parts = {name: part.to(scorer.device, scorer.dtype) for name, part in found.items()}
    if not all(part.isfinite().all() for part in parts.values()):
        raise overflow(scorer.dtype)
    return parts


def _check_ordinals(ordinals: Tensor, q: int) -> None:
    if not isinstance(ordinals, Tensor):
        found = type(ordinals).__name__
    elif ordinals.dtype != torch.int64 or ordinals.dim() != 2 or len(ordinals) != q:
        found = f"{ordinals.dtype} of shape {list(ordinals.shape)}"
    else:
        return
    raise StoreError(f"ordinals must be int64 [{q}, k], not {found}")
