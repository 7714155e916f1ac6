"""Scores by group: how much each domain, document or author adds to a query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost_core import UnknownNameError
from ghost_core.tracking import Patterns
from ghost_engines.search.together import Stores, scan_of
from ghost_engines.store import By, Labels, Queries, StoreError

REDUCTIONS = ("mean", "sum")
"""How the scores of a group's samples become one."""


@dataclass(frozen=True, repr=False)
class GroupScores:
    """Scores of groups.

    Attributes:
        groups: Numbers of the groups, rising, int64 `[G]`.
        names: Their names, if they have any.
        counts: How many samples each has, int64 `[G]`.
        scores: `[Q, G]`, float64.
    """

    groups: Tensor
    counts: Tensor
    scores: Tensor
    names: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        """Say how many there are."""
        q, n = self.scores.shape
        return f"{type(self).__name__}(Q={q}, G={n})"


def group_scores(
    stores: Stores,
    queries: Queries | Sequence[Queries],
    groups: Tensor | Labels,
    by: By | Sequence[By] = "dot",
    *,
    reduce: str = "sum",
    weights: Sequence[float] | None = None,
    parameters: Patterns | None = None,
    device: torch.device | str | None = None,
    block: int = 4096,
    progress: bool | None = None,
) -> GroupScores:
    """Add up, or average, the scores of the samples of each group.

    Args:
        stores: As for `search`.
        queries: As for `search`.
        groups: Group of each row, in order of the rows: its number, int64 `[N]`, or its name, such
            as `store.groups`.
        by: As for `search`. A sum of cosines is no cosine of the sum.
        reduce: `sum` or `mean`.
        weights: As for `search`.
        parameters: As for `search`.
        device: As for `search`; what is returned is there.
        block: As for `search`.
        progress: As for `search`.

    Raises:
        UnknownNameError: If `reduce` or a metric does not exist, or a glob matches nothing.
        StoreError: If there is not one group for each row, or something else does not fit.
        DamagedStoreError: If a file went missing or was altered.
    """
    if reduce not in REDUCTIONS:
        raise UnknownNameError("reduce", reduce, REDUCTIONS)
    comparison = scan_of(
        stores, queries, by=by, weights=weights, parameters=parameters, device=device, block=block
    )
    numbers = _numbers(groups) if isinstance(groups, Labels) else groups
    _check_groups(numbers, comparison.n)
    known, inverse, counts = numbers.to(comparison.device).unique(
        return_inverse=True, return_counts=True
    )
    sums = torch.zeros(comparison.q, len(known), dtype=torch.float64, device=comparison.device)
    for start, ids, scores in comparison.scores("scores by group", progress):
        sums.index_add_(1, inverse[start : start + len(ids)], scores.double())
    sums = comparison.unscaled(sums)
    names = None
    if isinstance(groups, Labels):
        names = tuple(groups.names[number] for number in known.tolist())
    return GroupScores(known, counts, sums / counts if reduce == "mean" else sums, names)


def _numbers(groups: Labels) -> Tensor:
    """Return the numbers of groups, of which each has one name, and no two the same."""
    numbers, n = groups.codes.long(), len(groups.names)
    if len(set(groups.names)) < n or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < n):
        raise StoreError(
            f"the {n} names of groups do not fit their numbers",
            reason="a number has no name, or two of them have the same",
            remedy="take store.groups, or give numbers without names, int64",
        )
    return numbers


def _check_groups(groups: Tensor, n: int) -> None:
    if not isinstance(groups, Tensor):
        found = type(groups).__name__
    elif groups.dtype != torch.int64 or groups.shape != (n,):
        found = f"{groups.dtype} of shape {list(groups.shape)}"
    else:
        return
    raise StoreError(f"groups must be int64 [{n}], one for each row, not {found}")
