"""The per-sample gradient algebra: what can be asked of a batch of gradients `g_n`.

A sampler says what `g_n` looks like, `Outer` or `Dense`; an engine asks for dots, Grams,
projections and sums. Neither knows the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor

from ghost_core.algebra.factors import InputFactor
from ghost_core.algebra.numerics import accumulation_dtype, chunks


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


@dataclass(frozen=True)
class Outer(PerSampleGradient):
    """`g_n = Σ_t grad[n, t] ⊗ input[n, t]`, never built unless that is cheapest.

    Attributes:
        factor: The input side.
        grad: The output side, `[N, T, G, p]`.
        shape: Shape of the parameter; `[G·p, *d]`, or `[d, p]` for a transposed factor.
    """

    factor: InputFactor
    grad: Tensor
    shape: Size

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.grad.shape[0]

    def token_dot(self, directions: Tensor) -> Tensor:
        """Contract `⟨grad, mix(v)⟩` token by token; see the base class."""
        return self._contract(directions, dims=(2, 3))

    def dot(self, directions: Tensor) -> Tensor:
        """Contract with each direction, or build the gradients where K directions make up for it.

        Contraction costs 2NTdp a direction; building costs 2NTdp once and 2Ndp a direction.
        """
        k, tokens = directions.shape[0], self.grad.shape[1]
        if self.factor.transposed or (k - 1) * tokens <= k:
            return self._contract(directions, dims=(1, 2, 3))
        flat = as_rows(directions).mT
        dtype = accumulation_dtype(self.grad, directions)
        built = [self.narrow(part).materialize() for part in chunks(self.n, self.shape.numel())]
        return torch.cat([as_rows(g.to(dtype)) @ flat.to(dtype) for g in built])

    def gram(self, other: PerSampleGradient) -> Tensor:
        """Multiply token Grams or built gradients, whichever takes fewer operations."""
        if isinstance(other, Outer) and self._tokens_are_cheaper(other):
            per_sample = self.groups * self.grad.shape[1] * other.n * other.grad.shape[1]
            rows = [
                self.narrow(part)._token_products(other, paired=False)
                for part in chunks(self.n, per_sample)
            ]
            return _narrowed(torch.cat(rows), self.grad, other)
        return built_gram(self, other)

    def paired(self, other: PerSampleGradient) -> Tensor:
        """Multiply token Grams or built gradients, whichever takes fewer operations."""
        if isinstance(other, Outer) and self._tokens_are_cheaper(other, paired=True):
            per_sample = self.groups * self.grad.shape[1] * other.grad.shape[1]
            rows = [
                self.narrow(part)._token_products(other.narrow(part), paired=True)
                for part in chunks(self.n, per_sample)
            ]
            return _narrowed(torch.cat(rows), self.grad, other)
        return built_paired(self, other)

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project both sides and sum over tokens; the gradient itself is never built."""
        seen, made = (left, right) if self.factor.transposed else (right, left)
        if self.factor.compressed:
            seen = None
        given = [tensor for tensor in (self.grad, left, right) if tensor is not None]
        dtype = accumulation_dtype(*given)
        if seen is None:
            inputs = self.factor.dense().to(dtype)
        else:
            inputs = self.factor.compress(seen.to(dtype)).x  # [N, T, G, k]
        grads = self.grad.to(dtype)
        if made is None:
            # Without a map the groups stay apart, stacked along the output axis.
            product = torch.einsum("ntgp,ntgl->ngpl", grads, inputs.to(dtype)).flatten(1, 2)
        else:
            blocks = made.to(dtype).unflatten(1, (self.groups, -1))  # [k, G, p]
            grads = torch.einsum("ntgp,kgp->ntgk", grads, blocks)
            product = torch.einsum("ntgk,ntgl->nkl", grads, inputs.to(dtype))
        return product.mT if self.factor.transposed else product

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Form the weighted gradient of the batch directly."""
        grad = self.grad.to(accumulation_dtype(self.grad))
        if weights is not None:
            dtype = accumulation_dtype(grad, weights)
            grad = grad.to(dtype) * weights.to(dtype)[:, None, None, None]
        return self._as_parameter(self.factor.sum_outer(grad).unsqueeze(0))[0]

    def materialize(self) -> Tensor:
        """Build the gradients, `[N, *shape]`."""
        grad = self.grad.to(accumulation_dtype(self.grad))
        return self._as_parameter(self.factor.outer(grad))

    def narrow(self, samples: slice | Tensor) -> Outer:
        """Return the gradients of some of the samples: a slice, or their positions."""
        return Outer(self.factor.narrow(samples), self.grad[samples], self.shape)

    @property
    def groups(self) -> int:
        """Number of independent groups G."""
        return self.grad.shape[2]

    def _contract(self, directions: Tensor, dims: tuple[int, ...]) -> Tensor:
        dtype = accumulation_dtype(self.grad, directions)
        grad = self.grad.to(dtype)
        dots = [
            (self.factor.mix(self._as_map(direction.to(dtype))) * grad).sum(dims)
            for direction in directions
        ]
        return torch.stack(dots, dim=-1)

    def _as_map(self, direction: Tensor) -> Tensor:
        """Turn a direction of the parameter's shape into `[G, p, d]`."""
        if self.factor.transposed:
            return direction.mT.unsqueeze(0)
        return direction.reshape(self.groups, self.shape[0] // self.groups, -1)

    def _as_parameter(self, gradients: Tensor) -> Tensor:
        """Turn `[N, G, p, d]` into `[N, *shape]`."""
        if self.factor.transposed:
            return gradients[:, 0].mT
        return gradients.reshape(gradients.shape[0], *self.shape)

    def _tokens_are_cheaper(self, other: Outer, *, paired: bool = False) -> bool:
        if self.groups != other.groups:
            return False
        tokens, others = self.grad.shape[1], other.grad.shape[1]
        size, sides = math.prod(self.shape), self.grad.shape[3] + self._d
        pairs = self.n if paired else self.n * other.n
        by_token = pairs * tokens * others * sides * self.groups
        built = size * (self.n * tokens + other.n * others + pairs)
        return by_token < built

    @property
    def _d(self) -> int:
        return math.prod(self.shape) // (self.groups * self.grad.shape[3])

    def _token_products(self, other: Outer, *, paired: bool) -> Tensor:
        """Sum products of inner products in float64.

        Both factors cancel in the sum where inputs have a large mean: at a mean of 1000, float32
        leaves an error of 5 %.
        """
        grads, others = self.grad, other.grad
        if self.factor.transposed == other.factor.transposed:
            inputs = self.factor.inner(other.factor, paired=paired)
            pattern = "ntgp,nsgp->ngts" if paired else "ntgp,msgp->nmgts"
            outputs = torch.einsum(pattern, grads.double(), others.double())
        else:
            # One use's inputs live on the axis of the other's gradients: a tied embedding and head.
            inputs = self.factor.inner(others, paired=paired)
            outputs = other.factor.inner(grads, paired=paired)
            outputs = outputs.mT if paired else outputs.permute(1, 0, 2, 4, 3)
        return (inputs * outputs).sum((-3, -2, -1))


@dataclass(frozen=True)
class Dense(PerSampleGradient):
    """Gradients given as they are: biases, norms, and whatever has no cheaper form.

    Attributes:
        terms: `[N, T, *shape]`, terms of each gradient that are summed over T on use. T is 1 where
            they cannot be told apart.
    """

    terms: Tensor
    shape: Size = field(init=False)

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
        gradients = self.materialize()
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
        gradients = self.materialize()
        if weights is None:
            return gradients.sum(0)
        dtype = accumulation_dtype(gradients, weights)
        return torch.einsum("n,n...->...", weights.to(dtype), gradients.to(dtype))

    def materialize(self) -> Tensor:
        """Return the gradients, `[N, *shape]`."""
        return self.terms.sum(1, dtype=accumulation_dtype(self.terms))

    def narrow(self, samples: slice | Tensor) -> Dense:
        """Return the gradients of some of the samples: a slice, or their positions."""
        return Dense(self.terms[samples])


def matrix_shape(shape: Size) -> tuple[int, int]:
    """Return a parameter's shape as a matrix: first axis by all others; a vector is one column."""
    return (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)


def as_rows(values: Tensor) -> Tensor:
    """Flatten all axes but the first: `[N, *shape]` to `[N, prod(shape)]`."""
    return values.reshape(values.shape[0], values.shape[1:].numel())


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


def _narrowed(values: Tensor, grad: Tensor, other: Outer) -> Tensor:
    return values.to(accumulation_dtype(grad, other.grad))
