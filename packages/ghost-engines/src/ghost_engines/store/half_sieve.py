"""Which rows may be among the best for a few queries: products with rows as they are stored."""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ghost_engines.store.powers import times

_MOST_QUERIES = 3
"""Up to how many products with stored rows take less time than widening them."""

_FEWEST_ROWS = 256
"""From where on a sieve costs less than it saves."""

_COLUMNS = range(16, 2**20)
"""Of how many columns it does, and what products are off is known."""

_SINGLE = 2.0**-24
"""What rounding to float32 changes a number by, at most and relatively."""

_TINY = 2.0**-126
"""Numbers below it are zero to some CPUs."""

_LEAST = 2.0**-23
"""More than products lose where they are too small for their dtype."""

_LEVEL = 13
"""Two to which power what products are compared with is about, at most."""

_LARGEST = {torch.float16: 15, torch.bfloat16: 60}
"""Two to which power the largest number of a query is about, at most, by dtype of the rows."""


class HalfSieve:
    """Tells which rows of a block may score more than what was found so far, for few queries.

    Products are taken of rows as they are stored, in float16 or bfloat16, which is done when these
    were read once; to score them, they are widened first. They decide nothing but which rows
    cannot be among the best; all others get the scores that they have without a sieve.

    Why none is lost: let q be a query as float32 products are taken with it, times a power of two,
    and t what a row must score more than, times the same power; x a row, b what q is in the dtype
    of rows, c their length, v = 2⁻²⁴ what one rounding to float32 changes a number by, u the same
    for the dtype of rows, and g = (c + 16) v / (1 - (c + 16) v), which bounds what a sum of c
    products is off in float32, in any order, relative to the sum of their magnitudes (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.1). By Cauchy and Schwarz

        score - ⟨q, x⟩   ≤  g ‖q‖ ‖x‖        what it is rounded by without a sieve
        ⟨q, x⟩ - ⟨b, x⟩  ≤  ‖q - b‖ ‖x‖      queries are few: their rounding is known
        ⟨b, x⟩ - s       ≤  g ‖b‖ ‖x‖        products of half precision are added up in float32

    where s is the product before it is rounded itself. With e the sum of ‖q - b‖, g ‖b‖ and g ‖q‖,
    a row scores at most t if s < t - e ‖x‖. A cosine is the product divided by a length and takes
    as much again for rounding rows to length 1, or dividing by what they seem to be long: with
    4 g ‖q‖ in place of g ‖q‖, a row scores at most t if s < (t - e) ‖x‖.

    ‖x‖ is known as a sum in float32, which is off by g, relatively: e is times 1 + 2 g, and
    2 g |t - e| is for cosines. Rounding keeps the order of numbers: if s ≥ τ, it becomes
    τ - u |τ| or more, and half of u is for computing τ in float32. Numbers that are too small for
    products in their dtype are less than 2⁻²³ all together, and squares of small numbers that
    underflow in ‖x‖ less than 2⁻⁶¹ √c. Powers are such that τ is about 2¹³ at most, so that a
    product that overflows is a row that passes, or is far below.

    Args:
        asked: Queries as products are taken with them, float32 `[Q, c]` on the CPU.
        columns: Which columns of a row they are compared with.
        rows: Dtype of the rows.
        longest: Length of the longest row.
        cosine: Whether products are divided by the lengths of rows.
        smallest: Whether rows are asked for that score less; scores are negated then.
    """

    def __init__(
        self,
        asked: Tensor,
        columns: slice,
        rows: torch.dtype,
        longest: float,
        *,
        cosine: bool,
        smallest: bool,
    ) -> None:
        self._exact = -asked.double() if smallest else asked.double()
        self._columns, self._dtype, self._cosine = columns, rows, cosine
        self._longest = longest
        self._rounding = torch.finfo(rows).eps / 2
        c = asked.shape[1]
        self._sum = (c + 16) * _SINGLE / (1 - (c + 16) * _SINGLE)
        self._shortest = sqrt(c) * 2.0**-61
        self._limits: list[tuple[Tensor, float, float]] | None = None

    @staticmethod
    def pays(rows: torch.dtype, queries: Tensor, block: int) -> bool:
        """Return whether a sieve takes less time than it saves, where lengths of rows are known.

        Args:
            rows: Dtype of the rows.
            queries: `[Q, c]`.
            block: How many rows there are in a block.
        """
        q, c = queries.shape
        enough = 0 < q <= _MOST_QUERIES and c in _COLUMNS and block >= _FEWEST_ROWS
        at_hand = queries.device.type == "cpu" and queries.dtype is torch.float32
        at_hand = at_hand and rows in _LARGEST
        return enough and at_hand and _multiplies_half() and adds_up_in_float32(rows)

    def raise_to(self, least: Tensor) -> None:
        """Let rows pass from now on that may score more than some number for some query.

        Args:
            least: The numbers `[Q, 1]`.
        """
        if not least.isfinite().all():  # not enough rows were found so far
            self._limits = None
            return
        exact, least = self._exact, least.double()
        norms = exact.norm(dim=1, keepdim=True)
        reach = (self._rounding + 3 * self._sum) * norms  # about what products are off
        far = least.abs().maximum(reach) * self._longest
        far = far if self._cosine else least.abs().maximum(reach * self._longest)
        largest = _LARGEST[self._dtype] - exact.abs().amax(1, keepdim=True).frexp().exponent
        powers = (_LEVEL - far.frexp().exponent).minimum(largest)
        q, least = times(exact, powers), times(least, powers)
        b = q.to(self._dtype)
        b = b.masked_fill(b.abs() < _TINY, 0)
        off, sums = (q - b.double()).norm(dim=1, keepdim=True), self._sum
        norms = q.norm(dim=1, keepdim=True) * (4 if self._cosine else 1)
        e = (1 + 2 * sums) * (off + sums * (b.double().norm(dim=1, keepdim=True) + norms))
        start, slope = self._lines(least, e)
        # Queries of zeros score nothing, so that no row scores more than what was found.
        self._limits = [
            (b[at], start[at].item(), slope[at].item())
            for at in range(len(b))
            if bool(exact[at].any())
        ]

    def _lines(self, least: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return what products of rows that pass are at least: a number, and one times ‖x‖."""
        u = 1.5 * self._rounding
        if self._cosine:
            slope = least - e
            lost = slope.abs() * self._shortest
            return -_LEAST - lost, slope - (2 * self._sum + u) * slope.abs()
        return least - u * least.abs() - e * self._shortest - _LEAST, -e * (1 + u)

    def passing(self, rows: Tensor, known: Tensor | None) -> Tensor | None:
        """Return which rows pass.

        Args:
            rows: `[B, k_total]`, as they are stored.
            known: What they are long, as a sum in float32 says, `[B]`.

        Returns:
            Their places, rising, int64 `[n]`; None for all.
        """
        if self._limits is None or known is None:
            return None
        found = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        for query, start, slope in self._limits:
            products = torch.mv(rows[:, self._columns], query).float()
            found |= products >= known.mul(slope).add_(start)
        places = found.nonzero().flatten()
        return places if len(places) <= len(rows) // 2 else None


@cache
def adds_up_in_float32(dtype: torch.dtype) -> bool:
    """Return whether products in half precision are exact as long as float32 is.

    Torch can be asked to add up in half precision where a CPU does, and on some it did not have to
    be asked. Sums of these whole numbers are exact in float32, in any order, and small as a whole;
    in half precision, no product and no sum on the way would be.
    """
    c, n = 256, 64
    numbers = torch.Generator().manual_seed(0)
    rows = torch.randint(129, 256, (n, c), generator=numbers)
    query = torch.randint(65, 128, (c,), generator=numbers)
    rows[:, c // 2 :], query[c // 2 :] = rows[:, : c // 2].roll(37, 1), -query[: c // 2].roll(37)
    rows[:, 0] += 1
    rows, query = rows[:, order := torch.randperm(c, generator=numbers)], query[order]
    exact = (rows * query).sum(1)
    found = torch.mv(rows.to(dtype), query.to(dtype))
    return bool((found.double() == exact).all())


@cache
def _multiplies_half() -> bool:
    """Return whether torch has products of half precision that are faster than widening.

    It tells what a CPU has since 2.12 or so; where it does not, they are taken to be slow.
    """
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_f"))
