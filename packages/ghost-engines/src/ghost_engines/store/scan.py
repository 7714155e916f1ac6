"""How rows are compared with queries, block by block, for searches and tables of scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from ghost_core.algebra import accumulation_dtype, full_precision
from ghost_core.tracking import Patterns
from ghost_engines.progress import Progress
from ghost_engines.store.errors import StoreError
from ghost_engines.store.given import check_store
from ghost_engines.store.half_sieve import HalfSieve
from ghost_engines.store.held_rows import HeldRows
from ghost_engines.store.powers import in_range, level_weights, overflow, powers_for
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.scorer import By, Queries, RowReader, Scorer
from ghost_engines.store.sieve import Sieve

_ENOUGH = 256
"""Rows that are worth a call of all that scores them."""

ValueT = TypeVar("ValueT")


class Scan:
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
        for start, found in self._blocks(title, progress):
            yield start, found[0].ids, self._scores(start, found)

    def above(
        self, least: Tensor, title: str, progress: bool | None, *, smallest: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ordinals `[n]`, ids `[n]` and scores `[Q, n]` of rows, as far as they matter.

        Rows are left out if they score no more than some number for any query; others may be.

        The best 10 rows, in blocks of 4096:

            block 1   nothing is known of the best: all rows are scored, and yielded
            block 2   3 rows may be among the best: they wait
            block 3   260 more may: all 263 are scored, and yielded

        Args:
            least: The numbers `[Q, 1]`, which may change from block to block.
            title: As for `scores`.
            progress: As for `scores`.
            smallest: Whether to negate the scores, before they are compared with the numbers.

        Raises:
            StoreError: As for `scores`.
            DamagedStoreError: As for `scores`.
        """
        sieve, passed = self._sieve(smallest), _Passed()
        for start, found in self._blocks(title, progress, sieved=sieve is not None):
            at = None
            if sieve is not None:
                with full_precision(self.device):
                    at = sieve.passing(found[0].rows, self._lengths(start, len(found[0])))
            if at is not None and len(at):
                passed.add(at + start, found[0][at])
            if at is not None and passed.n < _ENOUGH:
                continue
            if passed.n:
                yield self._scored(passed, smallest)
            if at is None:
                yield from self._all(start, found, smallest)
            if sieve is not None:
                sieve.raise_to(least)
        if passed.n:
            yield self._scored(passed, smallest)

    @property
    def _held(self) -> HeldRows | None:
        """All rows, if there is one store and they are in memory."""
        return self._stores[0].held_rows if len(self._stores) == 1 else None

    def _sieve(self, smallest: bool) -> Sieve | HalfSieve | None:
        """Return what tells which rows may be among the best, where that is worth its time."""
        if len(self._stores) > 1 or self._row_weights is not None:
            return None
        return self._scorers[0].sieve(min(self._block, self.n), self._held, smallest=smallest)

    def _lengths(self, start: int, n: int) -> Tensor | None:
        """Return what rows are long, if it is known."""
        return None if self._held is None else self._held.lengths[start : start + n]

    def _all(
        self, start: int, found: list[StoredRows], smallest: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ordinals, ids and scores of all rows that were found, block by block."""
        whole = len(found[0]) <= self._block
        for at in range(0, len(found[0]), self._block):
            rows = found if whole else [each[at : at + self._block] for each in found]
            scores = self._scores(start + at, rows)
            ordinals = torch.arange(start + at, start + at + len(rows[0]), device="cpu")
            yield ordinals, rows[0].ids, scores.neg_() if smallest else scores

    def _scored(self, passed: _Passed, smallest: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return ordinals, ids and scores of rows that passed the sieve."""
        ordinals, rows = passed.take()
        scores = self._scores(0, [rows])
        return ordinals, rows.ids, scores.neg_() if smallest else scores

    def _blocks(
        self, title: str, progress: bool | None, *, sieved: bool = False
    ) -> Iterator[tuple[int, list[StoredRows]]]:
        """Yield the first ordinal of blocks, and what each store has of them.

        Blocks of rows in memory grow if they go through a sieve, where each costs some calls.
        """
        start = 0
        if sieved and self._held is not None:
            scans = [self._held.growing(self._block)]
        else:
            scans = [store.scan(self._block) for store in self._stores]
        with Progress(self.n, title, progress) as bar:
            for found in aligned(scans):
                yield start, found
                start += len(found[0])
                bar.advance(len(found[0]))

    def _scores(self, start: int, found: list[StoredRows]) -> Tensor:
        """Return the scores of the same rows of each store."""
        # Not held while nobody computes: a generator may be left at any yield.
        with full_precision(self.device):
            scores = self._scorers[0](found[0].rows)
            for scorer, other in zip(self._scorers[1:], found[1:], strict=True):
                scores = scores + scorer(other.rows)
            if self._row_weights is not None:
                scores *= self._row_weights[start : start + len(found[0])]
            _check_scores(scores)
        return scores

    def unscaled(self, scores: Tensor) -> Tensor:
        """Return scores `[Q, n]` that were yielded, or sums of such, as what they are.

        Raises:
            StoreError: If their dtype cannot hold them.
        """
        return in_range(scores, -self._powers.to(scores.device) - self._row_power, scores.dtype)


class _Passed:
    """Rows that passed a sieve, and wait until it is worth while to score them."""

    def __init__(self) -> None:
        self.n = 0
        self._found: list[tuple[Tensor, StoredRows]] = []

    def add(self, ordinals: Tensor, rows: StoredRows) -> None:
        """Add rows, in memory of their own, which come after those before."""
        self._found.append((ordinals, rows))
        self.n += len(ordinals)

    def take(self) -> tuple[Tensor, StoredRows]:
        """Return the ordinals of all rows, and these, and forget them."""
        ordinals = torch.cat([each for each, _ in self._found])
        ids = torch.cat([rows.ids for _, rows in self._found])
        rows = torch.cat([rows.rows for _, rows in self._found])
        self.n, self._found = 0, []
        return ordinals, StoredRows(ids, rows)


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
        found = [head if len(head) == n else head[:n] for head in there]
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


def _check_scores(scores: Tensor) -> None:
    if scores.numel() and not isfinite(scores.sum().item()) and not scores.isfinite().all():
        raise overflow(scores.dtype)
