"""Which rows may be among the best: products in bfloat16, with a bound on what they are off."""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ghost_engines.store.columns import Columns

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of rows that bfloat16 has the range of."""

_FEWEST_QUERIES, _FEWEST_IF_KNOWN, _FEWEST_ROWS = 24, 8, 256
"""From where on products in bfloat16 cost less than they save; where lengths are known, sooner."""

_COLUMNS = range(16, 2**20)
"""Of how many columns they do, and what they are off is known."""

TILE = 1024
"""Rows that are compared at once, while they are in the cache."""

_HALF, _SINGLE = 2.0**-8, 2.0**-24
"""What rounding to bfloat16 and to float32 changes a number by, at most and relatively."""

_TINY = 2.0**-126
"""Numbers below it are zero to some CPUs, and so are products."""

_FAR = 2.0**126
"""More than any product of rows that are not too long."""

_LENGTHS = {False: (-1.0, 2.0**80), True: (1e-12, 1e12)}
"""Between which lengths of rows products, and cosines, stay in the range of float32."""

_EASE = 1.25
"""How many times as long as a block's longest row those of the next may be with the same limits."""

_ALL = slice(None)

_LONGEST_REST = 32
"""For how many blocks a sieve through which most rows pass is left alone, at most."""


class Sieve:
    """Tells which rows of a block may score more than what was found so far.

    Products are taken in bfloat16, for which some CPUs need a quarter of the time. They decide
    nothing but which rows cannot be among the best, whatever was rounded on the way; all others get
    the scores that they have without a sieve.

    Why none is lost: let q be a query and x a row, both as float32 products are taken of them, b
    and y what they are in bfloat16, c their length, u = 2⁻⁸ and v = 2⁻²⁴ what one rounding to
    bfloat16 and float32 changes a number by, and g = (c + 16) v / (1 - (c + 16) v), which bounds
    what a sum of c products is off in float32, in any order, relative to the sum of their
    magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). By Cauchy and Schwarz

        score - ⟨q, x⟩   ≤  g ‖q‖ ‖x‖             what it is rounded by without a sieve
        ⟨q, x⟩ - ⟨b, x⟩  ≤  ‖q - b‖ ‖x‖           queries are few: their rounding is known
        ⟨b, x⟩ - ⟨b, y⟩  ≤  u ‖b‖ ‖x‖
        ⟨b, y⟩ - s       ≤  g (1 + u) ‖b‖ ‖x‖     products of bfloat16 are added up in float32

    where s is the product before it is rounded itself. ‖x‖ is a sum in float32 too, and at most
    1 + g times what it seems. A cosine is the same with ‖x‖ = 1, where y is x divided by its
    length: that adds 2 g ‖b‖ to what rows are rounded by, and 2 g ‖q‖ to the first line. So

        score  ≤  s + e ‖x‖    with    e = (1 + 2 g) (‖q - b‖ + (u + 4 g) ‖b‖ + 3 g ‖q‖)

    and a row scores at most t if s < t - e ‖x‖ = τ. Rounding keeps the order of numbers: if s ≥ τ,
    it becomes τ - u |τ| or more. A quarter of u and a 2⁻¹⁶th of e are for rounding τ in float32.
    CPUs may take numbers below 2⁻¹²⁶ for zero, and squares of small numbers underflow in ‖x‖; with
    queries of about 2²⁰, that is less than adding 2⁻⁶¹ √c to ‖x‖. oneDNN, whose products these are,
    adds up in float32 unless it is asked not to ("accumulation mode"), which torch does not.

    Args:
        asked: Queries as products are taken with them, float32 `[Q, c]` on the CPU, each with a
            largest entry of about 2²⁰.
        columns: Which columns of a row they are compared with.
        block: How many rows there are in a block.
        cosine: Whether products are divided by the lengths of rows.
        smallest: Whether rows are asked for that score less; scores are negated then.
    """

    def __init__(
        self, asked: Tensor, columns: Columns, block: int, *, cosine: bool, smallest: bool
    ) -> None:
        exact = -asked.double() if smallest else asked.double()
        rounded = exact.to(torch.bfloat16)
        self._asked = rounded.masked_fill(rounded.abs() < _TINY, 0)
        self._columns, self._cosine = columns, cosine
        self._zero = (exact == 0).all(dim=1, keepdim=True)
        self._error = relative_error(exact, self._asked.double())[:, None]
        self._shortest = sqrt(exact.shape[1]) * 2.0**-61
        q, c = exact.shape
        self._tile = tile = min(TILE, block)
        self._wide = torch.empty(tile, c, dtype=torch.float32, device="cpu")
        self._rows = torch.empty(tile, c, dtype=torch.bfloat16, device="cpu")
        self._lengths = torch.empty(tile, dtype=torch.float32, device="cpu")
        self._products = self._rows.new_empty(q * tile), self._wide.new_empty(q * tile)
        self._rest = self._left = 0
        self.raise_to(torch.full((len(exact), 1), -torch.inf, device="cpu"))

    @staticmethod
    def pays(rows: torch.dtype, queries: Tensor, block: int, *, known: bool = False) -> bool:
        """Return whether a sieve takes less time than it saves.

        Args:
            rows: Dtype of the rows.
            queries: `[Q, c]`.
            block: How many rows there are in a block.
            known: Whether it will be told what rows are long.
        """
        q, c = queries.shape
        enough = (
            q >= (_FEWEST_IF_KNOWN if known else _FEWEST_QUERIES)
            and c in _COLUMNS
            and block >= _FEWEST_ROWS
        )
        at_hand = queries.device.type == "cpu" and rows in _DTYPES
        at_hand = at_hand and queries.dtype is torch.float32
        return enough and at_hand and bool(torch.backends.mkldnn.enabled) and _multiplies_bfloat16()

    def raise_to(self, least: Tensor) -> None:
        """Let rows pass from now on that may score more than some number for some query.

        Args:
            least: The numbers `[Q, 1]`.
        """
        # Queries of zeros score nothing, so that no row scores more than what was found.
        self._least = least.double().masked_fill(self._zero, torch.inf)
        self._found = bool(least.isfinite().all())  # else not enough rows were found so far
        self._limit_for = torch.nan

    def passing(self, rows: Tensor, known: Tensor | None = None) -> Tensor | None:
        """Return which rows pass.

        Args:
            rows: `[B, k_total]`, float16, bfloat16 or float32 on the CPU.
            known: What they are long, as a sum in float32 says, `[B]`; None to find it out.

        Returns:
            Their places, rising, int64 `[n]`; None for all.
        """
        if self._left or not self._found:
            self._left = max(0, self._left - 1)
            return None
        passed = []
        for start in range(0, len(rows), self._tile):
            place = slice(start, start + self._tile)
            tile = self.passing_of(rows[place], None if known is None else known[place])
            if tile is None:
                return None
            passed.append(tile + start)
        found = torch.cat(passed)
        if len(found) <= len(rows) // 2:
            self._rest = 0
            return found
        # As where all rows are alike: looking at each block would cost more than it saves.
        self._rest = self._left = min(max(1, 2 * self._rest), _LONGEST_REST)
        return None

    def passing_of(self, rows: Tensor, known: Tensor | None = None) -> Tensor | None:
        """Return which rows of a tile pass, int64 `[n]`; None where no bound is known."""
        n, q = rows.shape[0], self._asked.shape[0]
        wide, narrow = self._wide[:n], self._rows[:n]
        wide.copy_(rows[:, self._columns])
        lengths = known
        if lengths is None or rows.shape[1] > wide.shape[1]:
            lengths = torch.linalg.vector_norm(wide, dim=1, out=self._lengths[:n])
        shortest, longest = (each.item() for each in lengths.aminmax())
        if not _LENGTHS[self._cosine][0] < shortest <= longest < _LENGTHS[self._cosine][1]:
            return None
        if self._cosine:
            wide.div_(lengths[:, None])
            longest = 1.0
        narrow.copy_(wide)
        rounded, products = (room[: q * n].view(q, n) for room in self._products)
        torch.mm(self._asked, narrow.mT, out=rounded)
        products.copy_(rounded)
        if not longest <= self._limit_for <= _EASE**2 * longest:  # it is of other rows
            self._limit_for = longest if self._cosine else _EASE * longest
            self._limit = self._limits(torch.tensor([self._limit_for]))
        hit = (products.amax(dim=1, keepdim=True) >= self._limit).flatten().nonzero().flatten()
        if not hit.numel():
            return hit
        products, limit = products[hit], self._limit[hit]
        found = (products >= limit).any(dim=0).nonzero().flatten()
        if not self._cosine and found.numel() > n // 16:  # of each its own: one may be long
            limit = self._limits(lengths[found], hit)
            found = found[(products[:, found] >= limit).any(dim=0)]
        return found

    def _limits(self, lengths: Tensor, some: slice | Tensor = _ALL) -> Tensor:
        """Return what products of rows that pass are at least, for lengths `[n]`, `[Q, n]`."""
        reach = self._error[some] * (lengths.double() + self._shortest)
        limit = (self._least[some] - reach).clamp(-_FAR, _FAR)
        return (limit - (1.25 * _HALF) * limit.abs() - 2 * _TINY).float()


def relative_error(exact: Tensor, rounded: Tensor) -> Tensor:
    """Return how much more rows of length 1 may score than their products in bfloat16 say.

    Args:
        exact: Queries, float64 `[Q, c]`.
        rounded: What they are in bfloat16, float64 `[Q, c]`.

    Returns:
        What `Sieve` calls e, float64 `[Q]`.
    """
    g = (exact.shape[1] + 16) * _SINGLE
    g = g / (1 - g)
    off, q, b = (each.norm(dim=1) for each in (exact - rounded, exact, rounded))
    error: Tensor = (1 + 2 * g) * (off + (_HALF + 4 * g) * b + 3 * g * q) * (1 + 2.0**-16)
    return error


@cache
def _multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for products of bfloat16.

    Torch tells since 2.12 or so; where it does not, they are taken to be missing.
    """
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
