"""The per-sample gradient algebra: what can be asked of a batch of gradients `g_n`.

A sampler says what `g_n` looks like, `Outer` or `Dense`; an engine asks for dots, Grams,
projections and sums. Neither knows the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Size, Tensor

from ghost_core.algebra.numerics import accumulation_dtype, chunks
from ghost_core.algebra.reduced import Reduced


class PerSampleGradient(ABC):
    """The gradients of N samples for one use of one parameter.

    Results are float32, or float64 where a factor or an argument is float64.
    """

    shape: Size
    """Shape of the parameter."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of samples N."""

    @abstractmethod
    def token_dot(self, directions: Tensor) -> Tensor:
        """Return the dots token by token.

        Args:
            directions: `[K, *shape]`.

        Returns:
            `[N, T, K]`, which sums over T to `dot`. T is 1 where tokens are not known apart.
        """

    @abstractmethod
    def dot(self, directions: Tensor) -> Tensor:
        """Return `⟨g_n, v_k⟩`.

        Args:
            directions: K directions v, `[K, *shape]`.

        Returns:
            `[N, K]`.
        """

    @abstractmethod
    def gram(self, other: PerSampleGradient) -> Tensor:
        """Return `⟨g_n, h_m⟩` with the M gradients of another use or batch, `[N, M]`."""

    @abstractmethod
    def paired(self, other: PerSampleGradient) -> Tensor:
        """Return `⟨g_n, h_n⟩`, `[N]`. With itself: squared norms."""

    @abstractmethod
    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Return `L g_n Rᵀ`, each gradient seen as the matrix `[shape[0], prod(shape[1:])]`.

        Args:
            left: `[k_left, shape[0]]`; None leaves the axis as it is.
            right: `[k_right, prod(shape[1:])]`; None leaves the axis as it is. The axis of an
                input factor that is compressed already is left as it is in any case.

        Returns:
            `[N, k_left, k_right]`.
        """

    @abstractmethod
    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Return `Σ_n w_n g_n`, of the parameter's shape; weights `[N]` are ones by default."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """Return the gradients themselves, `[N, *shape]`."""

    @abstractmethod
    def narrow(self, samples: slice | Tensor) -> PerSampleGradient:
        """Return the gradients of some of the samples: a slice, or their positions."""

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        """Return dots, squared norms and the sum, as many of them as are asked for.

        Together they may cost less than one by one, which is how they are computed by default.

        Args:
            directions: K directions, `[K, *shape]`; None for no dots.
            norms: Whether to return squared norms.
            total: Whether to return the sum.
        """
        return Reduced(
            self.sum() if total else None,
            None if directions is None else self.dot(directions),
            self.paired(self) if norms else None,
        )


def matrix_shape(shape: Size) -> tuple[int, int]:
    """Return a parameter's shape as a matrix: first axis by all others; a vector is one column."""
    return (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)


def as_rows(values: Tensor) -> Tensor:
    """Flatten all axes but the first: `[N, *shape]` to `[N, prod(shape)]`."""
    return values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)


def gram_of_uses(uses: Sequence[PerSampleGradient], others: Sequence[PerSampleGradient]) -> Tensor:
    """Return the Gram matrix `[N, M]` of sums over uses, all cross terms included.

    A parameter used twice has the gradient `g + h`, and its Gram has four terms, not two:

        g = [[1]], h = [[2]]  one sample, one entry
        gram_of_uses([g, h], [g, h])  1·1 + 1·2 + 2·1 + 2·2 = 9 = (1 + 2)²
        g.gram(g) + h.gram(h)  1·1 + 2·2 = 5, without the cross terms
    """
    return torch.stack([use.gram(other) for use in uses for other in others]).sum(0)


def paired_of_uses(
    uses: Sequence[PerSampleGradient], others: Sequence[PerSampleGradient]
) -> Tensor:
    """Return `⟨Σ g_n, Σ h_n⟩`, `[N]`, over all pairs of uses."""
    return torch.stack([use.paired(other) for use in uses for other in others]).sum(0)


def built_gram(left: PerSampleGradient, right: PerSampleGradient) -> Tensor:
    """Multiply built gradients, as many at once as fit into memory."""
    size = left.shape.numel()
    rows = []
    for part in chunks(left.n, size):
        mine = as_rows(left.narrow(part).materialize())
        row = []
        for other in chunks(right.n, size):
            theirs = as_rows(right.narrow(other).materialize())
            dtype = accumulation_dtype(mine, theirs)
            row.append(mine.to(dtype) @ theirs.to(dtype).mT)
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)


def built_paired(left: PerSampleGradient, right: PerSampleGradient) -> Tensor:
    """Multiply built gradients of the same samples, as many at once as fit into memory."""
    rows = []
    for part in chunks(left.n, left.shape.numel()):
        mine, theirs = left.narrow(part).materialize(), right.narrow(part).materialize()
        dtype = accumulation_dtype(mine, theirs)
        rows.append(as_rows(mine.to(dtype) * theirs.to(dtype)).sum(1))
    return torch.cat(rows)
