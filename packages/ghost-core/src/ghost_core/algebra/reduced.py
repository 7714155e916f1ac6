"""What engines reduce per-sample gradients to in one go, while each is in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**18
"""Elements of built gradients that are reduced at once: a MiB of float32 stays in the cache."""

ALONE = 2**14
"""Elements of a gradient that is built alone: one product for each sample is faster then."""


@dataclass(frozen=True)
class Reduced:
    """What is left of the gradients of N samples. What was not asked for is None.

    Attributes:
        total: `Σ_n g_n`, of the parameter's shape.
        dots: `⟨g_n, v_k⟩` with K directions, `[N, K]`.
        squared_norms: `‖g_n‖²`, `[N]`.
    """

    total: Tensor | None = None
    dots: Tensor | None = None
    squared_norms: Tensor | None = None


def reduce_built(
    built: Iterable[Tensor], directions: Tensor | None, *, norms: bool, total: bool
) -> Reduced:
    """Reduce gradients that are built some samples at a time.

    Args:
        built: Gradients of consecutive samples, `[n, S]`, in float32 or float64. The first becomes
            the sum; the memory of the others may be used again for the next.
        directions: `[K, S]`; None for no dots.
        norms: Whether to return squared norms.
        total: Whether to return the sum.

    Returns:
        What was asked for; the sum is `[S]`.
    """
    whole: Tensor | None = None
    dots: list[Tensor] = []
    squared: list[Tensor] = []
    for part in built:
        single = part.shape[0] == 1
        if directions is not None:
            dtype = torch.promote_types(part.dtype, directions.dtype)
            dots.append(part.to(dtype) @ directions.to(dtype).mT)
        if norms:
            squared.append(part[0].dot(part[0])[None] if single else part.square().sum(1))
        if total:
            of_part = part[0] if single else part.sum(0)
            whole = of_part if whole is None else whole.add_(of_part)
    return Reduced(
        whole,
        torch.cat(dots) if dots else None,
        torch.cat(squared) if squared else None,
    )


def outer_products(lefts: Tensor, rights: Tensor) -> Iterator[Tensor]:
    """Yield `Σ_t left[n, t] ⊗ right[n, t]` sample by sample, `[1, a·b]`.

    The first has memory of its own; the others share some.

    Args:
        lefts: `[N, T, a]`.
        rights: `[N, T, b]`.
    """
    product = lefts.new_empty(0)
    for at, (left, right) in enumerate(zip(lefts.mT, rights, strict=True)):
        if at < 2:
            product = left @ right
        else:
            torch.mm(left, right, out=product)
        yield product.view(1, -1)
