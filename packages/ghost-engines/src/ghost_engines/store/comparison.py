"""How rows are compared with queries, block by block, for searches and tables of scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from math import isfinite
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ghost_core import UnknownNameError
from ghost_core.algebra import accumulation_dtype, full_precision
from ghost_core.tracking import Patterns
from ghost_engines.progress import Progress
from ghost_engines.store.columns import Columns, columns_of, count
from ghost_engines.store.errors import StoreError
from ghost_engines.store.given import check_store, device_of, number
from ghost_engines.store.manifest import Manifest
from ghost_engines.store.origin import query_rows
from ghost_engines.store.powers import in_range, level_weights, overflow, powers_for, times
from ghost_engines.store.rows import RowBatch, StoredRows

METRICS = ("cosine", "dot")
"""How a row can be compared with a query, by name."""

_SHORTEST = 1e-12
"""Length of rows whose squares are added up in float32 without a loss, and 1 / it the longest."""

_IN_CACHE = 512
"""Rows that a CPU widens and multiplies at once, while they are in its cache."""

_FEW = 8
"""Queries for which multiplying takes less than calling it more often."""

ValueT = TypeVar("ValueT")


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
        self._cosine = by == "cosine"
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

    def scale(self, powers: Tensor) -> None:
        """Take products with queries times two to these powers `[Q, 1]` from now on."""
        self._asked = times(self.queries, powers).to(self.device, self.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the scores `[Q, B]` of rows `[B, k_total]`."""
        scores = self._asked.new_empty(len(self._asked), len(rows))
        tiled = self.device.type == "cpu" and len(scores) > _FEW
        size = _IN_CACHE if tiled else max(len(rows), 1)
        if len(self._room) < min(size, len(rows)):  # made once, as new memory costs as much again
            self._room = self._room.new_empty(min(size, len(rows)), self._room.shape[1])
        for part in map(slice, range(0, len(rows), size), range(size, len(rows) + size, size)):
            self._multiply(rows[part], scores[:, part])
        return scores

    def _multiply(self, rows: Tensor, out: Tensor) -> None:
        rows = self._room[: len(rows)].copy_(rows[:, self.columns])
        lengths = torch.linalg.vector_norm(rows, dim=1) if self._cosine else None
        if lengths is not None and not _SHORTEST < lengths.min() <= lengths.max() < 1 / _SHORTEST:
            rows, lengths = unit_length(rows), None
        torch.mm(self._asked, rows.mT, out=out)
        if lengths is not None:
            out.div_(lengths)


class Comparison:
    """Scores of the rows of stores with queries, added up over the stores.

    Args:
        stores: Stores of the same samples, in the same order; most often one.
        queries: What to compare the rows of each with, of Q queries each.
        by: How, for all or each; `dot`, `cosine` or a metric such as a whitening.
        weights: What the scores of each are multiplied with; by default 1.
        row_weights: What the scores of each row are multiplied with, once they are added up, `[N]`.
        parameters: Globs over the parameters whose columns are compared; by default all.
        device: Where to compute; by default where the queries are.
        block: Rows to compare at once.

    Attributes:
        n: Number of rows.
        q: Number of queries.

    Raises:
        UnknownNameError: If a metric or a parameter does not exist.
        StoreError: If there is not one of each for each store, or something does not fit.
    """

    def __init__(
        self,
        stores: Sequence[RowReader],
        queries: Sequence[Queries],
        *,
        by: By | Sequence[By] = "dot",
        weights: Sequence[float] | None = None,
        row_weights: Tensor | None = None,
        parameters: Patterns | None = None,
        device: torch.device | str | None = None,
        block: int = 4096,
    ) -> None:
        ways: Iterable[By]
        if isinstance(by, Sequence) and not isinstance(by, str):
            ways = _for_each("by", by, stores)
        else:
            ways = repeat(by)
        factors = repeat(1.0) if weights is None else _for_each("weights", weights, stores)
        if isinstance(stores, str) or not isinstance(stores, Sequence):
            check_store(stores)
        asked = _for_each("queries", queries, stores)
        self._stores, self._block = stores, block
        self._scorers = [
            Scorer(store, those, how, weight, parameters, device)
            for store, those, how, weight in zip(stores, asked, ways, factors, strict=False)
        ]
        if len({len(store) for store in stores}) != 1 or not stores:
            raise StoreError(
                f"the stores must hold the same samples, but have {[len(s) for s in stores]} rows"
            )
        if len({len(scorer.queries) for scorer in self._scorers}) != 1:
            lengths = [len(scorer.queries) for scorer in self._scorers]
            raise StoreError(f"there must be as many queries for each store, not {lengths}")
        self.n, self.q = len(stores[0]), len(self._scorers[0].queries)
        self._row_weights: Tensor | None = None
        self._row_power = 0
        if row_weights is not None:
            checked = _checked_row_weights(row_weights, self.n).to(self.device)
            self._row_weights, self._row_power = level_weights(checked, self.dtype)
        self._scale()

    def _scale(self) -> None:
        """Have all scorers scale queries alike, so that scores can be compared and added up."""
        dtypes = {scorer.dtype for scorer in self._scorers}
        least = torch.float32 if torch.float32 in dtypes else torch.float64
        together = torch.cat([scorer.queries for scorer in self._scorers], dim=1)
        self._powers = powers_for(together, least)
        for scorer in self._scorers:
            scorer.scale(self._powers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scores."""
        return accumulation_dtype(*(scorer.dtype for scorer in self._scorers))

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self._scorers[0].device

    def scores(self, title: str, progress: bool | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the first ordinal, the ids `[B]` and the scores `[Q, B]` of blocks of rows.

        Each query's scores are times a power of two, which `unscaled` takes out again: they can be
        compared and added up.

        Args:
            title: What is going on, for the progress bar.
            progress: Whether to show one.

        Raises:
            StoreError: If a score is not finite, or the stores hold different samples.
            DamagedStoreError: If a file went missing or was altered.
        """
        start = 0
        scans = [store.scan(self._block) for store in self._stores]
        with Progress(self.n, title, progress) as bar:
            for found in aligned(scans):
                # Not held while nobody computes: a generator may be left at any yield.
                with full_precision(self.device):
                    scores = self._scorers[0](found[0].rows)
                    for scorer, other in zip(self._scorers[1:], found[1:], strict=True):
                        scores = scores + scorer(other.rows)
                    if self._row_weights is not None:
                        scores *= self._row_weights[start : start + len(found[0])]
                    _check_scores(scores)
                yield start, found[0].ids, scores
                start += len(found[0])
                bar.advance(len(found[0]))

    def unscaled(self, scores: Tensor) -> Tensor:
        """Return scores `[Q, n]` that were yielded, or sums of such, as what they are.

        Raises:
            StoreError: If their dtype cannot hold them.
        """
        return in_range(scores, -self._powers.to(scores.device) - self._row_power, scores.dtype)


def aligned(scans: Sequence[Iterator[StoredRows]]) -> Iterator[list[StoredRows]]:
    """Yield the same rows of each of several stores, of which shards may end elsewhere.

    Raises:
        StoreError: If they are not those of the same samples.
    """
    start = 0
    heads = [next(scan, None) for scan in scans]
    while True:
        there = [head for head in heads if head is not None]
        if len(there) < len(heads):
            return
        n = min(map(len, there))
        found = [head[:n] for head in there]
        if any(not torch.equal(each.ids, found[0].ids) for each in found[1:]):
            raise StoreError(
                f"the stores hold different samples, or in another order, from row {start} on",
                reason="scores are added up row by row",
                remedy="make them from the same data in the same order",
            )
        yield found
        start += n
        heads = [
            head[n:] if len(head) > n else next(scan, None)
            for head, scan in zip(there, scans, strict=True)
        ]


def _for_each(name: str, given: Sequence[ValueT], stores: Sequence[RowReader]) -> Sequence[ValueT]:
    if isinstance(given, str | Tensor) or not isinstance(given, Sequence):
        raise StoreError(
            f"{name} must be a list, one for each of {len(stores)} stores, not a "
            f"{type(given).__name__}"
        )
    if len(given) != len(stores):
        raise StoreError(f"there are {len(given)} {name} for {len(stores)} stores")
    return given


def _checked_row_weights(given: Tensor, n: int) -> Tensor:
    """Return weights of rows after looking at them."""
    usable = isinstance(given, Tensor) and given.shape == (n,) and given.is_floating_point()
    if usable and given.isfinite().all():
        return given.detach()
    found = f"{given.dtype} of shape {list(given.shape)}" if isinstance(given, Tensor) else given
    raise StoreError(
        f"row_weights must be finite floating point numbers, [{n}], not {found!r}",
        reason="every row has one, in the order of the rows",
        remedy="make them of a column of the store, such as torch.sigmoid(-store.losses)",
    )


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


def _check_scores(scores: Tensor) -> None:
    if scores.numel() and not isfinite(scores.sum().item()) and not scores.isfinite().all():
        raise overflow(scores.dtype)


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
