"""Approximate search, for many searches among the same rows: FAISS looks into some cells alone."""

from __future__ import annotations

from math import frexp, sqrt
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ghost_core import UnknownNameError
from ghost_core.algebra import accumulation_dtype, full_precision
from ghost_core.arguments import whole
from ghost_core.tracking import Patterns
from ghost_engines.extras import needed
from ghost_engines.progress import Progress
from ghost_engines.store import (
    METRICS,
    By,
    GradientStore,
    Neighbours,
    Queries,
    Scorer,
    StoreError,
    check_store,
    columns_of,
    in_range,
    powers_for,
    times,
    unit_length,
)

_PER_CELL = 64
"""Rows for each cell, on average, that cells are laid out with."""

_TOP = 15
"""The largest number in an index is below two to this power; float16 ends at two to the 16th."""

_LEAST = 2.0**-14
"""The least number that float16 holds with all its digits."""


class ApproximateIndex:
    """Cells of rows that lie near each other, of which a search looks into a few.

    What it finds is most often among the best rows, and not always: `search` of the store is exact.
    It pays where the same rows are searched again and again, since all of them are read and held in
    memory first, `2 · N · k_total` bytes in float16. Needs the extra `faiss`.

    Make one with `of`.
    """

    def __init__(
        self,
        store: GradientStore,
        by: str,
        parameters: Patterns | None,
        index: Any,
        ids: Any,
        power: int,
    ) -> None:
        self._store, self._by, self._parameters = store, by, parameters
        self._index, self._ids, self._power = index, ids, power

    @classmethod
    def of(
        cls,
        store: GradientStore,
        by: str = "dot",
        *,
        parameters: Patterns | None = None,
        cells: int | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Read all rows of a store into cells.

        Args:
            store: The store.
            by: `dot` or `cosine`: how rows are compared.
            parameters: Globs over names of modules and parameters: whose columns to compare.
            cells: How many cells to make; by default as many as the root of the number of rows.
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Raises:
            MissingExtraError: If FAISS is not installed.
            UnknownNameError: If the metric does not exist, or a glob matches nothing.
            StoreError: If there are more cells than rows, or float16 cannot hold the shortest rows
                and the longest ones, multiplied with one power of two.
            DamagedStoreError: If a file went missing or was altered.
        """
        check_store(store)
        if by not in METRICS:
            raise UnknownNameError("metric", by, METRICS)
        faiss = needed("faiss", "faiss", "approximate search")
        columns, n = columns_of(store.manifest, parameters), len(store)
        cells = max(1, round(sqrt(n))) if cells is None else whole("cells", cells, least=1)
        if cells > n:
            raise StoreError(f"there are {n} rows for {cells} cells")

        def read(rows: Tensor) -> Tensor:
            found = rows[:, columns].to(accumulation_dtype(store.dtype))
            return unit_length(found) if by == "cosine" else found

        width = len(torch.arange(store.k_total)[columns])
        flat = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFScalarQuantizer(
            flat, width, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        index.cp.min_points_per_centroid = 1  # it would print a warning otherwise
        step = max(1, n // (cells * _PER_CELL))
        ids = []
        with full_precision(torch.device("cpu")), Progress(2 * n, "index", progress) as bar:
            some, largest = [], 0.0
            for found in store.scan():
                rows = read(found.rows)
                largest = max(largest, rows.abs().max().item())
                some.append(rows[::step].clone())
                bar.advance(len(found))
            power = _TOP - frexp(largest)[1]
            index.train(_scaled(torch.cat(some), power))
            for found in store.scan():
                index.add(_scaled(read(found.rows), power))
                ids.append(found.ids.clone())
                bar.advance(len(found))
        index.own_fields = True  # so that it keeps the inner one, which python then lets go
        flat.this.disown()
        return cls(store, by, parameters, index, torch.cat(ids), power)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return int(self._index.nlist)

    def search(
        self, queries: Queries, k: int = 10, by: By | None = None, *, probes: int = 16
    ) -> Neighbours:
        """Find rows that are most often the best for each query.

        Args:
            queries: As for the store's own search.
            k: How many rows to find for each query.
            by: A `Whitening`, for an index by dot; by default as the index was made.
            probes: How many cells to look into. More is nearer to exact, and slower; with all of
                them only the rounding to float16 is left.

        Returns:
            Scores, ids and ordinals, each `[Q, min(k, len)]`, best first.

        Raises:
            StoreError: If something does not fit, the cells hold fewer rows, or scores overflow.
        """
        if by is not None and (isinstance(by, str) or self._by != "dot"):
            raise StoreError(
                f"the index is by {self._by}, not by {by!r}",
                remedy="make another one; one by dot also takes a whitening",
            )
        k = min(whole("k", k, least=1, error=StoreError), len(self._store))
        probes = min(whole("probes", probes, least=1, error=StoreError), self.cells)
        scorer = Scorer(self._store, queries, by or self._by, 1.0, self._parameters, "cpu")
        powers = powers_for(scorer.queries, torch.float32)
        self._index.nprobe = probes
        scores, found = self._index.search(_floats(times(scorer.queries, powers)), k)
        ordinals = torch.from_numpy(found)
        if (ordinals < 0).any():
            raise StoreError(
                f"{probes} cells hold fewer than {k} rows for some queries", remedy="raise probes"
            )
        back = in_range(torch.from_numpy(scores), -powers - self._power, scorer.dtype)
        return Neighbours(back, self._ids[ordinals], ordinals)


def _scaled(rows: Tensor, power: int) -> npt.NDArray[np.float32]:
    """Return rows times two to a power, float32, of which float16 holds all digits that it has.

    Raises:
        StoreError: If some are too short for it.
    """
    scaled = times(rows.double(), torch.tensor(power))
    short = (scaled.abs().amax(1) < _LEAST) & (rows != 0).any(1)
    if short.any():
        raise StoreError(
            "some rows underflow float16, in which an index holds them",
            reason="their numbers are less than a 500,000,000th of those of the longest rows",
            remedy='choose by="cosine", or search the store, which is exact',
        )
    return _floats(scaled)


def _floats(numbers: Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = np.ascontiguousarray(numbers.float().numpy())
    return found
