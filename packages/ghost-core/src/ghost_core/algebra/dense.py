"""Gradients that are given as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Size, Tensor

from ghost_core.algebra.gradients import (
    PerSampleGradient,
    as_rows,
    built_gram,
    built_paired,
    matrix_shape,
)
from ghost_core.algebra.numerics import accumulation_dtype
from ghost_core.algebra.reduced import Reduced, reduce_built


@dataclass(frozen=True)
class Dense(PerSampleGradient):
    """Gradients given as they are: biases, norms, and whatever has no cheaper form.

    Attributes:
        terms: `[N, T, *shape]`, terms of each gradient that are summed over T on use. T is 1 where
            they cannot be told apart.
        used: Whether the call used the parameter. If not, gradients are zero, and training makes
            none: where an engine makes what it gets, its `.grad` stays None.
    """

    terms: Tensor
    shape: Size = field(init=False)
    used: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.terms.shape[2:])

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.terms.shape[0]

    def token_dot(self, directions: Tensor) -> Tensor:
        """Return the dots term by term, `[N, T, K]`."""
        dtype = accumulation_dtype(self.terms, directions)
        terms = self.terms.to(dtype).reshape(*self.terms.shape[:2], self.shape.numel())
        return terms @ as_rows(directions.to(dtype)).mT

    def dot(self, directions: Tensor) -> Tensor:
        """Return `⟨g_n, v_k⟩`, `[N, K]`."""
        gradients = read_only(self)
        dtype = accumulation_dtype(gradients, directions)
        return as_rows(gradients.to(dtype)) @ as_rows(directions.to(dtype)).mT

    def gram(self, other: PerSampleGradient) -> Tensor:
        """Return `⟨g_n, h_m⟩`, `[N, M]`."""
        return built_gram(self, other)

    def paired(self, other: PerSampleGradient) -> Tensor:
        """Return `⟨g_n, h_n⟩`, `[N]`."""
        return built_paired(self, other)

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project the gradients as matrices, `[N, k_left, k_right]`."""
        matrix = self.materialize().reshape(self.n, *matrix_shape(self.shape))
        dtype = accumulation_dtype(matrix, *(side for side in (left, right) if side is not None))
        matrix = matrix.to(dtype)
        if left is not None:
            matrix = left.to(dtype) @ matrix
        return matrix if right is None else matrix @ right.to(dtype).mT

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Return the weighted gradient of the batch."""
        gradients = read_only(self)
        if weights is None:
            return gradients.sum(0)
        dtype = accumulation_dtype(gradients, weights)
        return torch.einsum("n,n...->...", weights.to(dtype), gradients.to(dtype))

    def materialize(self) -> Tensor:
        """Return the gradients, `[N, *shape]`."""
        return self.terms.sum(1, dtype=accumulation_dtype(self.terms))

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        """Sum the terms once, whatever is asked for."""
        if directions is not None and not (norms or total):
            return Reduced(dots=self.dot(directions))
        flat = None if directions is None else as_rows(directions)
        # The first gradient becomes the sum, and a single one is the caller's then.
        built = self.materialize() if self.n == 1 else read_only(self)
        found = reduce_built([as_rows(built)], flat, norms=norms, total=total)
        whole = None if found.total is None else found.total.reshape(self.shape)
        return Reduced(whole, found.dots, found.squared_norms)

    def narrow(self, samples: slice | Tensor) -> Dense:
        """Return the gradients of some of the samples: a slice, or their positions."""
        return Dense(self.terms[samples])


def read_only(gradient: PerSampleGradient) -> Tensor:
    """Return gradients as `materialize` does, in memory that may be that of what arrived.

    A sum of one term is a copy, which takes longer than most of what is done with it. Nothing may
    be written to what this returns, nor is it to be handed out: training computes with it.
    """
    if isinstance(gradient, Dense) and gradient.terms.shape[1] == 1:
        return gradient.terms[:, 0].to(accumulation_dtype(gradient.terms))
    return gradient.materialize()
