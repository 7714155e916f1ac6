"""The maps of a projection: how they are drawn and applied, and what tells them from others."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ghost_core import InputFactor, PerSampleGradient, Projection, Record, TrackedParameter
from ghost_core.algebra import accumulation_dtype, chunks
from ghost_engines.blocks import Block


class Maps(ABC):
    """Maps the gradients of one parameter to their block of a row."""

    def compress(self, record: Record) -> Record:
        """Return what the forward pass keeps of a call."""
        return record

    @abstractmethod
    def project(self, gradient: PerSampleGradient) -> Tensor:
        """Project per-sample gradients to `[N, size]`."""

    @abstractmethod
    def given(self, matrices: Tensor) -> Tensor:
        """Project gradients given as matrices `[N, *block.matrix]` to `[N, size]`."""

    @abstractmethod
    def dense(self) -> tuple[Tensor | None, Tensor | None]:
        """Return L `[k_left, n_left]` and R `[k_right, n_right]`; None for the identity."""

    @abstractmethod
    def drawn(self) -> Iterator[Tensor]:
        """Yield all that was drawn."""


@dataclass(frozen=True)
class Sides(Maps):
    """A map for each side of the matrix; None where an axis keeps all its dimensions."""

    left: Tensor | None
    right: Tensor | None

    def compress(self, record: Record) -> Record:
        """Compress the input side, where that makes it smaller."""
        if not isinstance(record, InputFactor):
            return record
        seen = self.left if record.transposed else self.right
        return record if seen is None else record.compress(seen)

    def project(self, gradient: PerSampleGradient) -> Tensor:
        """Return `L g Rᵀ`, row by row."""
        return gradient.project(self.left, self.right).flatten(1)

    def given(self, matrices: Tensor) -> Tensor:
        """Return `L g Rᵀ`, row by row."""
        if self.left is not None:
            matrices = self.left @ matrices
        return (matrices if self.right is None else matrices @ self.right.mT).flatten(1)

    def dense(self) -> tuple[Tensor | None, Tensor | None]:
        """Return L and R."""
        return self.left, self.right

    def drawn(self) -> Iterator[Tensor]:
        """Yield L and R, where there are any."""
        yield from (side for side in (self.left, self.right) if side is not None)


@dataclass(frozen=True)
class Sketch(Maps):
    """Adds each number of a gradient, with a random sign, to one of k (Charikar et al., 2002).

    It takes n numbers to remember, where a map of Gaussians takes k · n.

    Attributes:
        bucket: Which of the k each number goes to, int64 `[n]`.
        sign: -1 or 1, `[n]`.
        k: How many there are.
    """

    bucket: Tensor
    sign: Tensor
    k: int

    def project(self, gradient: PerSampleGradient) -> Tensor:
        """Build gradients some samples at a time, and sketch them."""
        rows = self.sign.new_zeros(gradient.n, self.k)
        for part in chunks(gradient.n, len(self.sign)):
            rows[part] = self.given(gradient.narrow(part).materialize())
        return rows

    def given(self, matrices: Tensor) -> Tensor:
        """Add up the numbers of each of the k."""
        flat = matrices.flatten(1).to(self.sign.dtype) * self.sign
        return flat.new_zeros(len(flat), self.k).index_add_(1, self.bucket, flat)

    def dense(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the sketch as a map, `[k, n]`."""
        left = self.sign.new_zeros(self.k, len(self.sign))
        return left.scatter_(0, self.bucket[None], self.sign[None]), None

    def drawn(self) -> Iterator[Tensor]:
        """Yield both."""
        yield from (self.bucket, self.sign)


def draw(projection: Projection, seed: int, parameter: TrackedParameter, block: Block) -> Maps:
    """Draw a parameter's maps, which depend on the seed and its name alone.

    Args:
        projection: What draws maps of sides.
        seed: The seed.
        parameter: The parameter.
        block: Its part of a row.
    """
    dtype, device = accumulation_dtype(parameter.dtype), parameter.device
    n_left, n_right = block.matrix
    if block.sketched and block.k_left < n_left:
        generator = _generator(seed, parameter.name, "sketch")
        bucket = torch.randint(0, block.k_left, (n_left,), generator=generator, device="cpu")
        bits = torch.randint(0, 2, (n_left,), generator=generator, device="cpu")
        return Sketch(bucket.to(device), (2 * bits - 1).to(device, dtype), block.k_left)

    def side(name: str, k: int, n: int) -> Tensor | None:
        if k == n:
            return None
        drawn = projection.draw(k, n, _generator(seed, parameter.name, name))
        return drawn.to(device, dtype)

    return Sides(side("left", block.k_left, n_left), side("right", block.k_right, n_right))


def digest(maps: Iterable[Maps]) -> str:
    """Return the sha256 of all that was drawn, in order."""
    found = hashlib.sha256()
    for each in maps:
        for tensor in each.drawn():
            # As it was drawn, which is in float32: a model in float64 has the same maps.
            exact = tensor.float() if tensor.is_floating_point() else tensor
            flat = exact.contiguous().cpu()
            found.update(f"{flat.dtype} {tuple(flat.shape)}\n".encode())
            found.update(flat.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _generator(seed: int, parameter: str, side: str) -> Generator:
    """Seed a generator from names, which unlike positions are equal in every process."""
    name = hashlib.sha256(f"{seed}/{parameter}/{side}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(name[:7], "big"))
