"""Whose is a row: the sample that each row of a call belongs to, as told or as found by a probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_core.errors import CaptureError
from ghost_core.split.axes import RowAxes
from ghost_core.split.refusals import scalar_output, unclear_fold, unreached
from ghost_core.split.sites import Site
from ghost_core.tracking import TrackedModule


class Fold(Enum):
    """How `n · k` rows belong to n samples."""

    SAMPLE_MAJOR = "sample-major"
    """k rows of the first sample, then k of the second: `[N, k, ...]` flattened."""
    SAMPLE_MINOR = "sample-minor"
    """One row of each sample, then the next of each: `[k, N, ...]` flattened."""

    def owners(self, n: int, rows: int) -> Tensor:
        """Return the sample that each row belongs to, int64 `[rows]`."""
        index = torch.arange(rows)
        return index // (rows // n) if self is Fold.SAMPLE_MAJOR else index % n


@dataclass(frozen=True)
class Hit:
    """Rows of a call that a gradient reached, which started at one sample of the model's output.

    Attributes:
        name: The module.
        axes: Where the call has its rows.
        rows: The rows.
        sample: The sample.
        n: Number of samples.
    """

    name: str
    axes: RowAxes
    rows: Sequence[int]
    sample: int
    n: int

    @property
    def outer_sizes(self) -> set[int]:
        """The orders of folded rows in which all of these belong to the sample.

        Rows may be `[A, N, B]` flattened; this has each A for which that fits. A is 1 where they
        are sample-major, and `rows / n` where they are sample-minor. With 4 rows of 2 samples:

            sample 0 reaches rows 0, 1    {1}     [N, k]: 0 0 1 1
            sample 0 reaches rows 0, 2    {2}     [k, N]: 0 1 0 1
            sample 0 reaches row 0        {1, 2}  either: another row has to tell
        """
        each = self.axes.count // self.n
        outers = [outer for outer in range(1, each + 1) if each % outer == 0]
        return self._fitting(outers)

    def _fitting(self, outers: Iterable[int]) -> set[int]:
        """Return which of some orders all rows fit."""
        # Not by torch, which takes several times as long for a few numbers.
        each, index = self.axes.count // self.n, np.asarray(self.rows, dtype=np.int64)
        return {
            outer for outer in outers if (index // (each // outer) % self.n == self.sample).all()
        }

    @property
    def is_mixed(self) -> bool:
        """Whether some of the rows cannot be the sample's; any can that are routed."""
        if self.axes.routed:
            return False
        if self.axes.owner is not None:
            return bool((self.axes.owner[self.rows] != self.sample).any())
        if self.axes.is_folded(self.n):
            return not self._fitting({1, self.axes.count // self.n})
        return list(self.rows) != [self.sample]


def find_folds(
    hits: Iterable[Hit], n: int, tracked: Mapping[str, TrackedModule]
) -> dict[str, Fold]:
    """Return the order of folded rows that all hits allow, by name of the module.

    Args:
        hits: What probes reached.
        n: Number of samples.
        tracked: The tracked modules by name.

    Raises:
        WrongSplitError: If there is none, or more than one.
    """
    possible: dict[tuple[str, int], set[int]] = {}
    for hit in hits:
        if n > 1 and hit.axes.is_folded(n):
            kind, sizes = (hit.name, hit.axes.count), hit.outer_sizes
            possible[kind] = possible.get(kind, sizes) & sizes
    folds: dict[str, Fold] = {}
    for (name, count), sizes in possible.items():
        known = {1: Fold.SAMPLE_MAJOR, count // n: Fold.SAMPLE_MINOR}
        if len(sizes) != 1 or not sizes <= known.keys():
            raise unclear_fold(tracked[name], len(sizes) > 1)
        fold = known[sizes.pop()]
        if folds.setdefault(name, fold) is not fold:
            raise unclear_fold(tracked[name], False)
    return folds


def owner_of_rows(
    tracked: TrackedModule,
    site: Site,
    grads: Sequence[Tensor | None],
    n: int,
    fold: Fold | None,
) -> Tensor | None:
    """Return the sample of each row at a site, int64 `[R]`; None where rows are samples.

    With 2 samples:

        [2, ...]   None: rows are samples
        [4, ...]   0 0 1 1, or 0 1 0 1, as probes told
        [5, ...]   0 1 1 0 1, say, as found for this pass alone

    Args:
        tracked: The module.
        site: Where it has its rows.
        grads: The gradients there, rows first.
        n: Number of samples.
        fold: How its rows are folded, as far as a probe told.

    Raises:
        WrongSplitError: If a gradient belongs to all samples or to none, or nothing told how rows
            are folded that have gradients other than zero.
    """
    for grad in grads:
        if grad is not None and not grad.dim():
            raise scalar_output(tracked)
    if site.found is not None:
        return _as_found(tracked, site.found, grads, n)
    axes = site.axes
    if axes.routed and axes.count:
        raise unreached(tracked)
    if not axes.is_folded(n):
        return axes.owner
    known = Fold.SAMPLE_MAJOR if n == 1 else fold
    if known is None:
        if any((grad != 0).any() for grad in grads if grad is not None):
            raise unclear_fold(tracked, True)
        known = Fold.SAMPLE_MAJOR  # no sample has anything there
    return known.owners(n, axes.count)


def _as_found(
    tracked: TrackedModule, found: Tensor, grads: Sequence[Tensor | None], n: int
) -> Tensor | None:
    """Return owners that were found, after asserting that rows of nobody have no gradient."""
    nobody = found < 0
    for grad in grads:
        if grad is not None and (grad[nobody.to(grad.device)] != 0).any():
            raise unreached(tracked)
    is_plain = len(found) == n and not nobody.any() and bool((found == torch.arange(n)).all())
    return None if is_plain else found.clamp(min=0)


def is_in_place(site: Site, n: int, folds: Mapping[str, Fold]) -> bool:
    """Tell whether rows were found to be of the samples that they are taken to be of.

    Args:
        site: Where rows were found out.
        n: Number of samples.
        folds: How rows are folded, as far as probes told, by name of the module.
    """
    axes, fold = site.axes, Fold.SAMPLE_MAJOR
    assert site.found is not None
    if axes.owner is not None:  # which a census compares with
        return True
    if axes.is_folded(n):
        known = folds.get(site.names[0])
        if known is None:
            return False
        fold = known
    owner = fold.owners(n, axes.count)
    return not axes.routed and bool(((site.found == owner) | (site.found < 0)).all())


def find_owner(
    key: str, given: Mapping[str, Tensor], inputs: Mapping[str, Any], samples: slice
) -> Tensor:
    """Return the sample in a pass that each row belongs to, int64 `[R]`.

    Args:
        key: The key of the tensor that tells.
        given: What the batch was opened with; positions of samples in the batch.
        inputs: The model's keyword inputs; positions of samples in the pass.
        samples: The pass's part of the batch.

    Raises:
        CaptureError: If there is no such tensor or it does not hold positions of samples.
    """
    owner = given[key] if key in given else inputs.get(key)
    if owner is not None and not isinstance(owner, Tensor):
        raise CaptureError(f"row_owner: {key!r} is a {type(owner).__name__}: give a tensor")
    if owner is None:
        listed = ", ".join(map(repr, given)) or "none"
        raise CaptureError(
            f"row_owner: there is no tensor {key!r} that tells the sample of each row, neither in "
            f"engine.batch(ids, owners={{{key!r}: ...}}), or verify(..., owners=...), which has "
            f"{listed}, nor among the model's keyword inputs"
        )
    if owner.dim() != 1 or owner.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise CaptureError(
            f"row_owner: {key!r} must be signed integers [R], not {owner.dtype} of shape "
            f"{tuple(owner.shape)}"
        )
    owner = owner.detach().long()
    if key in given:
        owner = owner[(owner >= samples.start) & (owner < samples.stop)] - samples.start
    n = samples.stop - samples.start
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < n:
        raise CaptureError(
            f"row_owner: {key!r} must hold positions of samples, from 0 to {n - 1}, not from "
            f"{int(owner.min())} to {int(owner.max())}"
        )
    return owner
