"""What engines reduce per-sample gradients to in one go, while each is in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**18
"""Elements of built gradients that are reduced at once: a MiB of float32 stays in the cache."""

ALONE = 2**14
"""Elements above which a gradient is built alone: one product for each sample is faster then."""


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
            squared.append(torch.linalg.vector_norm(part, dim=1).square())  # in one pass over it
        if total:
            of_part = part[0] if single else part.sum(0)
            whole = of_part if whole is None else whole.add_(of_part)
    return Reduced(
        whole,
        _joined(dots) if dots else None,
        _joined(squared) if squared else None,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def reduce_outer(
    lefts: Tensor, rights: Tensor, directions: Tensor | None, *, norms: bool, total: bool
) -> Reduced:
    """Reduce `Σ_t left[n, t] ⊗ right[n, t]`, which are built sample by sample.

    Nothing is done for each of them but the arithmetic: there is one for each sample and layer.

    Each sample's gradient is built where the one before was:

        built = left.T @ right   [a, b], which stays in the cache
        dots  = ⟨built, v⟩, squared = ⟨built, built⟩
        total += built

    Args:
        lefts: `[N, T, a]`, of at least one sample.
        rights: `[N, T, b]`, of the same dtype.
        directions: `[K, a·b]`, of the same dtype; None for no dots.
        norms: Whether to return squared norms.
        total: Whether to return the sum.

    Returns:
        What was asked for; the sum is `[a·b]`.
    """
    first, *others = zip(lefts.mT.unbind(), rights.unbind(), strict=True)
    whole = torch.mm(*first)
    built = torch.empty_like(whole) if total else whole  # the first becomes the sum
    flat, sums = built.view(-1), whole.view(-1)
    single = None if directions is None or len(directions) > 1 else directions[0]
    dots: list[Tensor] = []
    squared: list[Tensor] = []

    def reduce(each: Tensor) -> None:
        if single is not None:
            dots.append(each.dot(single))
        elif directions is not None:
            dots.append(directions.mv(each))
        if norms:
            squared.append(each.dot(each))

    reduce(sums)
    for pair in others:
        torch.mm(*pair, out=built)
        reduce(flat)
        if total:
            sums.add_(flat)
    return Reduced(
        sums if total else None,
        torch.stack(dots).view(len(dots), -1) if dots else None,
        torch.stack(squared) if squared else None,
    )
