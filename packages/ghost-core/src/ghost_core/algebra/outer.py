"""Gradients that are sums of outer products over tokens, which are built where that is cheapest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Size, Tensor
from torch.nn import functional

from ghost_core.algebra.factors import InputFactor, Tokens
from ghost_core.algebra.gradients import PerSampleGradient, as_rows, built_gram, built_paired
from ghost_core.algebra.numerics import accumulation_dtype, at_once, chunks
from ghost_core.algebra.reduced import ALONE, AT_ONCE, Reduced, reduce_built, reduce_outer

FEW = 2**14
"""Elements of gradients, all together, up to which to build them takes the fewest calls."""


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
        if other is self:
            squared = self.factor.squared_norms(self.grad.to(accumulation_dtype(self.grad)))
            if squared is not None:
                return squared
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
            inputs = self.factor.compress(seen.to(dtype)).x.to(dtype)  # [N, T, G, k]
        grads = self.grad.to(dtype)
        if self.groups == 1:  # as nearly all have: one product for all samples, one for each
            outputs = grads[:, :, 0]
            if made is not None:
                outputs = functional.linear(outputs, made.to(dtype))  # [N, T, k]
            product = outputs.mT @ inputs[:, :, 0]
        elif made is None:
            # Without a map the groups stay apart, stacked along the output axis.
            product = torch.einsum("ntgp,ntgl->ngpl", grads, inputs).flatten(1, 2)
        else:
            blocks = made.to(dtype).unflatten(1, (self.groups, -1))  # [k, G, p]
            grads = torch.einsum("ntgp,kgp->ntgk", grads, blocks)
            product = torch.einsum("ntgk,ntgl->nkl", grads, inputs)
        return product.mT if self.factor.transposed else product

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Form the weighted gradient of the batch directly."""
        grad = self.grad.to(accumulation_dtype(self.grad))
        if weights is not None:
            dtype = accumulation_dtype(grad, weights)
            grad = grad.to(dtype) * weights.to(dtype)[:, None, None, None]
        if self.groups == 1 and isinstance(self.factor, Tokens):
            # In the order of the parameter: a transposed copy takes a quarter of the product.
            inputs, grads = self.factor.x.to(grad.dtype).flatten(0, 2), grad.flatten(0, 2)
            left, right = (inputs, grads) if self.factor.transposed else (grads, inputs)
            return (left.mT @ right).reshape(self.shape)
        return self._as_parameter(self.factor.sum_outer(grad).unsqueeze(0))[0]

    def materialize(self) -> Tensor:
        """Build the gradients, `[N, *shape]`."""
        grad = self.grad.to(accumulation_dtype(self.grad))
        return self._as_parameter(self.factor.outer(grad))

    def narrow(self, samples: slice | Tensor) -> Outer:
        """Return the gradients of some of the samples: a slice, or their positions."""
        return Outer(self.factor.narrow(samples), self.grad[samples], self.shape)

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        """Build the gradients a few at a time where that makes up for contractions."""
        k = 0 if directions is None else directions.shape[0]
        if k == 1 and directions is not None and not (norms or total):  # as nearly always
            return Reduced(dots=self.dot(directions))
        if not self._is_worth_building(k, norms, total):
            return super().reduce(directions, norms=norms, total=total)
        flat = None if directions is None else as_rows(directions)
        sides = self._sides(directions)
        if sides is None:
            found = reduce_built(self._parts(), flat, norms=norms, total=total)
        else:
            found = reduce_outer(*sides, flat, norms=norms, total=total)
        whole = None if found.total is None else found.total.reshape(self.shape)
        return Reduced(whole, found.dots, found.squared_norms)

    def _is_worth_building(self, k: int, norms: bool, total: bool) -> bool:
        """Tell whether to build gradients takes less than to contract with K directions.

        Per element of a gradient, contraction takes 2T a direction and by tokens 4T²(d + p) / dp
        for the norm; to build one takes 2T, as to form the sum, and to go over it about 4 a time.
        Where there are few elements, what counts is how much is called.
        """
        if not norms and k + total <= 1:
            return False  # one contraction, or one sum
        if not self.n or not self.factor.can_be_built:
            return False
        if (norms or total) and self.n * self.shape.numel() <= FEW:
            return True
        tokens = self.grad.shape[1]
        by_token = 4 * tokens**2 * (1 / self._d + 1 / self.grad.shape[3]) if norms else 0
        contracted = 2 * tokens * (k + total) + min(by_token, 2 * tokens)
        return 2 * tokens + 4 * (k + norms + total) < contracted

    def _parts(self) -> Iterator[Tensor]:
        """Yield the gradients as `[n, S]`, as few at once as stay in the cache."""
        size = self.shape.numel()
        if at_once(size, limit=AT_ONCE) >= self.n:
            yield as_rows(self.materialize())
            return
        for part in chunks(self.n, size, limit=AT_ONCE):
            yield as_rows(self.narrow(part).materialize())

    def _sides(self, directions: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return both sides as `[N, T, rows]` and `[N, T, columns]` of the parameter.

        None where gradients are too small to be built alone, as where all stay in the cache, or are
        no products of two matrices.
        """
        dtype, size = accumulation_dtype(self.grad), self.shape.numel()
        if size <= ALONE or self.n * size <= AT_ONCE:
            return None
        if not isinstance(self.factor, Tokens) or self.groups > 1:
            return None
        if directions is not None and directions.dtype != dtype:
            return None
        inputs, grads = self.factor.x[:, :, 0].to(dtype), self.grad[:, :, 0].to(dtype)
        return (inputs, grads) if self.factor.transposed else (grads, inputs)

    @property
    def groups(self) -> int:
        """Number of independent groups G."""
        return self.grad.shape[2]

    def _contract(self, directions: Tensor, dims: tuple[int, ...]) -> Tensor:
        elements = 2 * self.grad.shape[1:].numel()
        if at_once(elements) < self.n:
            parts = chunks(self.n, elements)
            return torch.cat([self.narrow(part)._contract(directions, dims) for part in parts])
        dtype = accumulation_dtype(self.grad, directions)
        grad = self.grad.to(dtype)
        if directions.shape[0] == 1:
            single = self._products(directions[0].to(dtype), grad)
            return (_sums(single) if len(dims) == 3 else single.sum(dims)).unsqueeze(-1)
        products = (self._products(each, grad) for each in directions.to(dtype).unbind())
        dots = [_sums(each) if len(dims) == 3 else each.sum(dims) for each in products]
        return torch.stack(dots, dim=-1)

    def _products(self, direction: Tensor, grad: Tensor) -> Tensor:
        """Return what `⟨grad, mix(v)⟩` is the sum of, `[N, T, G, p]` or `[N, T, 1, d]`."""
        mapped, factor = self._as_map(direction), self.factor
        inputs = factor.x if type(factor) is Tokens and self.groups == 1 else None
        if inputs is not None and inputs.shape[3] < grad.shape[3] and grad.is_contiguous():
            # The same sum, ⟨vᵀ grad, inputs⟩, of fewer products: inputs are narrower.
            return (grad.flatten(0, 2) @ mapped[0]).view(inputs.shape).mul_(inputs)
        mixed = factor.mix(mapped)
        # To get more memory takes longer than to multiply.
        return mixed.mul_(grad) if factor.mixes_anew else mixed * grad

    def _as_map(self, direction: Tensor) -> Tensor:
        """Turn a direction of the parameter's shape into `[G, p, d]`."""
        if self.factor.transposed:
            return direction.mT.unsqueeze(0)
        groups = self.grad.shape[2]
        return direction.reshape(groups, self.shape[0] // groups, -1)

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


def _sums(values: Tensor) -> Tensor:
    """Return the sum of each sample, `[N]`, going through memory as the values lie there.

    Those of a convolution come with their channels first:

        [N, T, G, p] of strides (T·G·p, 1, T·p, T)  0, 2, 3, 1, which is no copy as rows
    """
    if not values.is_contiguous():
        strides = values.stride()
        behind = sorted(range(1, values.dim()), key=lambda axis: -strides[axis])
        values = values.permute(0, *behind)
    return as_rows(values).sum(1)


def _narrowed(values: Tensor, grad: Tensor, other: Outer) -> Tensor:
    return values.to(accumulation_dtype(grad, other.grad))
