"""Powers of two that keep products in the range of their dtype, and change no digit of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ghost_engines.store.errors import StoreError

_LEVEL = {torch.float32: 20, torch.float64: 300}
"""By dtype, two to which power the largest number of a query is about when products are taken.

In float32, rows from 1e-34 to 1e29 have products then that neither underflow nor overflow.
"""


def powers_for(queries: Tensor, dtype: torch.dtype) -> Tensor:
    """Return with which powers of two queries are multiplied before products are taken.

    Args:
        queries: `[Q, c]`, float64.
        dtype: What products are taken in.

    Returns:
        Exponents `[Q, 1]`, 0 for queries of zeros.
    """
    largest = queries.abs().amax(1, keepdim=True)
    return (_LEVEL[dtype] - largest.frexp().exponent).where(largest > 0, 0)


def times(numbers: Tensor, powers: Tensor) -> Tensor:
    """Multiply with powers of two, which may lie outside of the numbers' dtype themselves."""
    half = powers // 2
    one, other = (each.to(numbers.dtype).exp2() for each in (half, powers - half))
    return numbers * one * other


def in_range(scores: Tensor, powers: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply scores with powers of two, and return them in the dtype that they are to have.

    Args:
        scores: `[Q, n]`.
        powers: Exponents `[Q, 1]`.
        dtype: The dtype.

    Raises:
        StoreError: If some overflow, or some underflow and the query has no larger ones, beside
            which they would be zero but for rounding.
    """
    found = times(scores.to(dtype), powers)
    if not found.isfinite().all():
        raise overflow(dtype)
    limits, sizes = torch.finfo(dtype), found.abs()
    lost = ((sizes < limits.tiny) & (scores != 0)).any(1)
    if lost.any() and (lost & (sizes.amax(1) < limits.tiny / limits.eps)).any():
        raise StoreError(
            f"scores underflow {dtype}: scale the queries, give them as float64, or choose "
            'by="cosine"'
        )
    return found


def level_weights(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return weights of rows in the dtype of their scores, times a power of two, and which power.

    Args:
        weights: Finite, `[N]`.
        dtype: The dtype.

    Raises:
        StoreError: If some would be zero, or lose digits, beside the largest.
    """
    weights = weights.double()
    if not weights.any():
        return weights.to(dtype), 0
    largest = weights.abs().max()
    power = 1 - int(largest.frexp().exponent)
    level = times(weights, torch.tensor(power, device=weights.device))
    if ((level != 0) & (level.abs() < torch.finfo(dtype).tiny)).any():
        raise StoreError(
            f"row_weights lie too far apart: beside {largest.item():.3g}, {dtype} has no number "
            f"for {weights[weights != 0].abs().min().item():.3g}",
            reason="scores would be zero that are not",
            remedy="set such weights to zero, or give the queries as float64",
        )
    return level.to(dtype), power


def overflow(dtype: torch.dtype) -> StoreError:
    """Return what is wrong with scores that a dtype cannot hold."""
    return StoreError(
        f'scores overflow {dtype}: scale the queries, give them as float64, or choose by="cosine"'
    )
