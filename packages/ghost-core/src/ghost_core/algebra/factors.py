"""Input factors: the side of a per-sample gradient that is known in the forward pass.

Axes, here and everywhere: N samples, T tokens (or positions), G groups, d inputs, p outputs,
k projected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from ghost_core.algebra.numerics import accumulation_dtype


@dataclass(frozen=True)
class Record:
    """What a sampler keeps of a call until the backward pass.

    Subclasses are frozen dataclasses. Tensor fields have the samples on axis 0 and are saved by
    autograd, never held from Python; other fields are kept as they are.
    """

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor fields by name."""
        found: dict[str, Tensor] = {}
        for name in self.__dataclass_fields__:  # no comprehension: it is asked of each call
            value = getattr(self, name)
            if isinstance(value, Tensor):
                found[name] = value
        return found

    def replace(self, **changes: object) -> Self:
        """Return a copy with some fields changed."""
        kind: Any = type(self)
        if not _is_plain(kind) or not changes.keys() <= self.__dataclass_fields__.keys():
            return replace(self, **changes)
        copied = object.__new__(type(self))
        vars(copied).update(vars(self), **changes)  # a quarter of the time, twice for each call
        return copied

    def expand(self, n: int) -> Self:
        """Return the record of a call that one row was computed for and n samples share."""
        tensors = self.tensors().items()
        return self.replace(**{name: value.expand(n, *value.shape[1:]) for name, value in tensors})

    def narrow(self, samples: slice | Tensor) -> Self:
        """Return the record of some of the samples: a slice, or their positions."""
        return self.replace(**{name: value[samples] for name, value in self.tensors().items()})


@cache
def _is_plain(kind: type[Any]) -> bool:
    """Tell whether records of a class are what they were made with, field by field, and no more."""
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    whole = all(each.init for each in fields(kind))
    return whole and not slots and not hasattr(kind, "__post_init__")


class InputFactor(Record, ABC):
    """One side of `g_n = Σ_t grad[n, t] ⊗ input[n, t]`.

    The other side is the output gradient. Only `groups` and `dense` must be written; a layer that
    can do better than building `dense()` overrides the operations.
    """

    transposed: bool
    """Whether the parameter is laid out `[d, p]` instead of `[p, d]`."""

    compressed: bool = False
    """Whether the inputs are projected, so that d is k."""

    mixes_anew: ClassVar[bool] = False
    """Whether what `mix` returns is in memory of its own, which may be written to.

    It is said by the class that writes `mix`: one that overrides it says so anew.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        mixes = next(each for each in cls.__mro__ if vars(each).keys() & {"mix", "mixes_anew"})
        if "mixes_anew" not in vars(mixes):  # not even a factor, maybe
            cls.mixes_anew = False

    @property
    @abstractmethod
    def groups(self) -> int:
        """Number of independent groups G."""

    @property
    def can_be_built(self) -> bool:
        """Whether gradients of single samples are no larger than what they are computed from."""
        return True

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the factor itself, `[N, T, G, d]`."""

    def mix(self, weight: Tensor) -> Tensor:
        """Apply the layer's own linear map with k output units.

        Args:
            weight: `[G, k, d]`, float32 or float64.

        Returns:
            `[N, T, G, k]`.
        """
        dense = self.dense().to(weight.dtype)
        if self.groups == 1:  # as one matrix: a product of views that lie in another order is slow
            mixed = functional.linear(dense.flatten(0, 2), weight[0])
            return mixed.view(*dense.shape[:3], weight.shape[1])
        return torch.einsum("ntgd,gkd->ntgk", dense, weight)

    def compress(self, projection: Tensor) -> Tokens:
        """Project the inputs, `[k, d]`, to keep less until the backward pass."""
        weight = projection.unsqueeze(0).expand(self.groups, -1, -1)
        return Tokens(self.mix(weight), self.transposed, compressed=True)

    def inner(self, other: InputFactor | Tensor, *, paired: bool) -> Tensor:
        """Return the inner products of tokens.

        Args:
            other: The factor of M samples with S tokens, or a tensor `[M, S, G, d]`.
            paired: Whether sample n meets only sample n (then M = N).

        Returns:
            `[N, M, G, T, S]`, or `[N, G, T, S]` if paired, in float64.
        """
        left = self.dense().double()
        right = (other.dense() if isinstance(other, InputFactor) else other).double()
        return torch.einsum("ntgd,nsgd->ngts" if paired else "ntgd,msgd->nmgts", left, right)

    def outer(self, grad: Tensor) -> Tensor:
        """Sum the outer products with the output gradient over tokens.

        Args:
            grad: `[N, T, G, p]`.

        Returns:
            `[N, G, p, d]`.
        """
        dense = self.dense().to(grad.dtype)
        if self.groups == 1:  # as nearly all have: one product for each sample
            return (grad[:, :, 0].mT @ dense[:, :, 0]).unsqueeze(1)
        return torch.einsum("ntgp,ntgd->ngpd", grad, dense)

    def squared_norms(self, grad: Tensor) -> Tensor | None:
        """Return `‖g_n‖²`, `[N]`, where there is a closed form that takes least; else None.

        Args:
            grad: `[N, T, G, p]`, float32 or float64.
        """
        return None

    def sum_outer(self, grad: Tensor) -> Tensor:
        """Sum the outer products over tokens and samples: `[N, T, G, p]` to `[G, p, d]`."""
        return torch.einsum("ntgp,ntgd->gpd", grad, self.dense().to(grad.dtype))


@dataclass(frozen=True)
class Tokens(InputFactor):
    """Plain inputs, as a linear layer sees them. Any factor becomes this once it is compressed.

    Attributes:
        x: `[N, T, G, d]`.
        transposed: Whether the parameter is laid out `[d, p]`.
        compressed: Whether the inputs are projected already.
    """

    x: Tensor
    transposed: bool = False
    compressed: bool = False
    mixes_anew: ClassVar[bool] = True

    @property
    def groups(self) -> int:
        """Number of independent groups G."""
        return self.x.shape[2]

    def dense(self) -> Tensor:
        """Return the inputs, `[N, T, G, d]`."""
        return self.x


@dataclass(frozen=True)
class Lookups(InputFactor):
    """One-hot inputs, as an embedding sees them; never built as such but in `dense()`.

    The parameter is laid out `[size, p]`, so a head that shares it with an embedding is
    `Outer(Tokens, ...)` on `[p, d] = [size, d]`, and their cross term needs no special case.

    Attributes:
        index: Row of the table per token, int64 `[N, T]`.
        size: Number of rows of the table (d).
        weight: Weight per token `[N, T]`, zero for padding; None stands for ones.
    """

    index: Tensor
    size: int
    weight: Tensor | None = None
    transposed = True
    mixes_anew: ClassVar[bool] = True

    @property
    def groups(self) -> int:
        """Number of independent groups G, always one."""
        return 1

    @property
    def can_be_built(self) -> bool:
        """Whether the table is no longer than a sample, as one of positions is."""
        return self.size <= self.index.shape[1]

    def dense(self) -> Tensor:
        """Return the one-hot vectors times their weights, `[N, T, 1, size]`."""
        rows = functional.one_hot(self.index, self.size).unsqueeze(2)
        if self.weight is None:
            return rows.to(torch.float32)
        return self._weighted(rows.to(accumulation_dtype(self.weight)))

    def mix(self, weight: Tensor) -> Tensor:
        """Gather columns of the map: `[1, k, size]` to `[N, T, 1, k]`."""
        return self._weighted(functional.embedding(self.index, weight[0].mT).unsqueeze(2))

    def inner(self, other: InputFactor | Tensor, *, paired: bool) -> Tensor:
        """Compare indices, or gather from dense vectors; see `InputFactor.inner`."""
        if isinstance(other, Lookups):
            same = _tokens_left(self.index, paired) == _tokens_right(other.index, paired)
            product = same.double()
            if other.weight is not None:
                product = product * _tokens_right(other.weight.double(), paired)
        else:
            dense = other.dense() if isinstance(other, InputFactor) else other
            table = dense[:, :, 0]  # [M, S, size], of which few columns are looked up
            if paired:
                index = self.index.unsqueeze(1).expand(-1, table.shape[1], -1)
                product = table.gather(2, index).mT  # [N, T, S]
            else:
                product = table[:, :, self.index].permute(2, 0, 3, 1)  # [N, M, T, S]
            product = product.double()
        if self.weight is not None:
            product = product * _tokens_left(self.weight.double(), paired)
        return product.unsqueeze(-3)

    def outer(self, grad: Tensor) -> Tensor:
        """Scatter the gradient into the table: `[N, T, 1, p]` to `[N, 1, p, size]`."""
        rows = self._weighted(grad).flatten(0, 2)  # [N·T, p]
        n, p = len(grad), grad.shape[3]
        # As one table of all samples, which takes a third of what a table for each does. To gather
        # places is to refuse rows that a table does not have: they would be another sample's.
        places = torch.arange(n * self.size, device=rows.device).view(n, self.size)
        tables = rows.new_zeros(n * self.size, p)
        tables.index_add_(0, places.gather(1, self.index).flatten(), rows)
        return tables.view(n, self.size, p).mT.unsqueeze(1)

    def squared_norms(self, grad: Tensor) -> Tensor:
        """Add up what each row of the table gets from a sample, with no long table built."""
        if self.can_be_built:
            return self.outer(grad).square().sum((1, 2, 3))
        index, order = self.index.sort(1)
        # Tokens that look up the same row are neighbours now, and get the same place.
        place = functional.pad(index[:, 1:] != index[:, :-1], (1, 0)).cumsum(1)  # [N, T]
        rows = self._weighted(grad)[:, :, 0]  # [N, T, p]
        rows = rows.gather(1, order.unsqueeze(2).expand_as(rows))
        sums = torch.zeros_like(rows).scatter_add_(1, place.unsqueeze(2).expand_as(rows), rows)
        return sums.square().sum((1, 2))

    def sum_outer(self, grad: Tensor) -> Tensor:
        """Scatter the gradient of all samples into one table: `[1, p, size]`."""
        rows = self._weighted(grad).flatten(0, 2)  # [N·T, p]
        table = rows.new_zeros(self.size, rows.shape[1])
        table.index_add_(0, self.index.flatten(), rows)
        return table.mT.unsqueeze(0)

    def _weighted(self, values: Tensor) -> Tensor:
        if self.weight is None:
            return values
        return values * self.weight[:, :, None, None].to(values.dtype)


def _tokens_left(values: Tensor, paired: bool) -> Tensor:
    return values[:, :, None] if paired else values[:, None, :, None]


def _tokens_right(values: Tensor, paired: bool) -> Tensor:
    return values[:, None, :] if paired else values[None, :, None, :]
