"""What a row scores: how queries are prepared, and products with them taken."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isfinite
from typing import Protocol

import torch
from torch import Tensor

from ghost_core import UnknownNameError
from ghost_core.algebra import accumulation_dtype, full_precision
from ghost_core.tracking import Patterns
from ghost_engines.store.columns import Columns, columns_of, count
from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import StoreError
from ghost_engines.store.given import check_store, check_tensor, device_of, number
from ghost_engines.store.half_sieve import HalfSieve
from ghost_engines.store.held_rows import HeldRows
from ghost_engines.store.manifest import Manifest
from ghost_engines.store.origin import query_rows
from ghost_engines.store.powers import times
from ghost_engines.store.rows import RowBatch, StoredRows
from ghost_engines.store.sieve import Sieve

METRICS = ("cosine", "dot")
"""How a row can be compared with a query, by name."""

_SHORTEST = 1e-12
"""Length of rows whose squares are added up in float32 without a loss, and 1 / it the longest."""

_MULTIPLE = 64
"""Of how many rows products are taken: kernels round what is left over in ways of their own, and
equal rows are to have equal scores wherever they stand."""

_IN_CACHE = 512
"""Rows that a CPU widens and multiplies at once, while they are in its cache."""


class RowReader(Protocol):
    """What a comparison needs of a store."""

    @property
    def manifest(self) -> Manifest:
        """What the rows are."""

    @property
    def k_total(self) -> int:
        """Number of columns of a row."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def scan(self, size: int = 4096) -> Iterator[StoredRows]:
        """Yield all rows in order, each block in place of the one before."""

    def digest(self) -> str:
        """Return what tells the rows from others."""

    @property
    def held_rows(self) -> HeldRows | None:
        """All rows, if they are held in memory."""


class Metric(Protocol):
    """A way to compare rows that changes the queries, and then takes dot products with these."""

    def transform(self, store: RowReader, queries: Tensor, columns: Columns) -> Tensor:
        """Return the queries to take dot products with.

        Args:
            store: What the rows are in.
            queries: The columns that are compared, float64 `[Q, c]`, finite.
            columns: Which columns of a row these are.

        Returns:
            `[Q, c]`.

        Raises:
            StoreError: If it is not made for the rows of that store.
        """


By = str | Metric
"""`dot`, `cosine` or a metric."""

Queries = Tensor | RowBatch
"""Rows to compare with: a tensor `[Q, k_total]`, or what an engine collected."""


class Scorer:
    """Scores of one store's rows with queries.

    Args:
        store: What the rows are in.
        queries: What to compare them with.
        by: How.
        weight: What scores are multiplied with.
        parameters: Globs over the parameters whose columns are compared; by default all.
        device: Where to compute; by default where the queries are.

    Attributes:
        columns: Which columns of a row are compared.
        queries: What dot products are to be taken with, float64 `[Q, c]` on the CPU.
        dtype: What they are taken in.
        device: Where.

    Raises:
        UnknownNameError: If a metric or a parameter does not exist.
        StoreError: If the queries do not fit.
    """

    def __init__(
        self,
        store: RowReader,
        queries: Queries,
        by: By,
        weight: float,
        parameters: Patterns | None,
        device: torch.device | str | None,
    ) -> None:
        check_store(store)
        if isinstance(by, type):
            raise StoreError(
                f"{by.__name__} is a class, and no way to compare rows",
                reason="a metric is made of a store",
                remedy=f"give one that is made, as by={by.__name__}.of(store)",
            )
        if by not in METRICS and not hasattr(by, "transform"):
            raise UnknownNameError("metric", by, METRICS)
        if not isfinite(weight := number("weights", weight)):
            raise StoreError(f"weights must be finite, not {weight}")
        rows = query_rows(queries, store.manifest)
        self.dtype = _check_queries(store, rows)
        self.columns = columns_of(store.manifest, parameters)
        self._cosine, self._store_dtype = by == "cosine", store.dtype
        self.device = rows.device if device is None else device_of(device)
        with full_precision(torch.device("cpu")):
            asked = rows.detach().to("cpu", torch.float64)[:, self.columns]
            if not isinstance(by, str):
                asked = by.transform(store, asked, self.columns).double()
            elif self._cosine:
                asked = unit_length(_without_zeros(asked))
            self.queries = asked * weight
        self.scale(torch.zeros(1, dtype=torch.int32, device="cpu"))
        self._room = self._asked.new_empty(0, count(self.columns))
        self._scores = self._asked.new_empty(len(self._asked), 0)

    def scale(self, powers: Tensor) -> None:
        """Take products with queries times two to these powers `[Q, 1]` from now on."""
        self._asked = times(self.queries, powers).to(self.device, self.dtype)

    def sieve(
        self, block: int, held: HeldRows | None, *, smallest: bool
    ) -> Sieve | HalfSieve | None:
        """Return what tells which rows may be among the best, where that is worth its time."""
        asked, columns, cosine = self._asked, self.columns, self._cosine
        whole = held is not None and count(columns) == held.rows.rows.shape[1]
        if Sieve.pays(self._store_dtype, asked, block, known=whole):
            return Sieve(asked, columns, block, cosine=cosine, smallest=smallest)
        if held is None or not isinstance(columns, slice):
            return None
        # Of some columns alone, rows are as long as whole ones at most, and maybe shorter.
        known = held.longest < inf and (whole or not cosine)
        if not known or not HalfSieve.pays(self._store_dtype, asked, block):
            return None
        dtype, longest = self._store_dtype, held.longest
        return HalfSieve(asked, columns, dtype, longest, cosine=cosine, smallest=smallest)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the scores `[Q, B]` of rows `[B, k_total]`, in place of those returned before."""
        n = len(rows)
        if self._scores.shape[1] < n:  # made once, as new memory costs as much again
            self._scores = self._asked.new_empty(len(self._asked), n + -n % _MULTIPLE)
        scores = self._scores[:, :n]
        size = _IN_CACHE if self.device.type == "cpu" else max(n, 1)
        if len(self._room) < min(size, n):
            most = min(size, n)
            self._room = self._room.new_empty(most + -most % _MULTIPLE, self._room.shape[1])
        for start in range(0, n, size):
            part = rows[start : start + size]
            whole = part.shape[0] + -part.shape[0] % _MULTIPLE
            self._multiply(part, self._scores[:, start : start + whole])
        return scores

    def _multiply(self, rows: Tensor, out: Tensor) -> None:
        n, found = rows.shape[0], self._room[: out.shape[1]]
        found[:n].copy_(rows[:, self.columns])
        if n < out.shape[1]:
            found[n:] = found[:1]
        lengths = torch.linalg.vector_norm(found, dim=1) if self._cosine else None
        if lengths is not None:
            shortest, longest = (each.item() for each in lengths.aminmax())
            if not _SHORTEST < shortest <= longest < 1 / _SHORTEST:
                found, lengths = unit_length(found), None
        torch.mm(self._asked, found.mT, out=out)
        if lengths is not None:
            out.div_(lengths)


def _check_queries(store: RowReader, queries: Tensor) -> torch.dtype:
    """Return the dtype to compute in."""
    if not isinstance(queries, Tensor):
        raise StoreError(
            f"queries must be a tensor [Q, {store.k_total}] or rows such as engine.collect(), not "
            f"{type(queries).__name__}"
        )
    check_tensor("queries", queries)
    known = queries.dtype in STORAGE_DTYPES.values()
    if queries.dim() != 2 or queries.shape[1] != store.k_total or not known:
        raise StoreError(
            f"queries must be floating point [Q, {store.k_total}], not {queries.dtype} of shape "
            f"{list(queries.shape)}"
        )
    finite = queries.detach().isfinite().all(dim=1)
    if not finite.all():
        raise StoreError(f"queries {(~finite).nonzero().flatten().tolist()} are not finite")
    return accumulation_dtype(store.dtype, queries.dtype)


def _without_zeros(queries: Tensor) -> Tensor:
    zero = (queries == 0).all(dim=1)
    if zero.any():
        raise StoreError(
            f"queries {zero.nonzero().flatten().tolist()} are zero: they have no cosine with a row"
        )
    return queries


def unit_length(rows: Tensor) -> Tensor:
    """Scale rows to length 1; rows of zeros stay.

    Squares of small gradients underflow, so the largest entry is taken out first.
    """
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True))
    scaled = rows / largest.where(largest > 0, 1)
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    unit: Tensor = scaled / lengths.where(lengths > 0, 1)
    return unit
