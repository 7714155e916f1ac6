"""The random projections that ghost ships."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ghost_core import Projection


class GaussianProjection(Projection):
    """Independent normal entries of variance 1/k (Johnson and Lindenstrauss, 1984)."""

    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        """Draw `[k, n]`."""
        return torch.randn(
            k, n, generator=generator, dtype=torch.float32, device="cpu"
        ) / math.sqrt(k)


class RademacherProjection(Projection):
    """Independent signs over √k (Achlioptas, 2003)."""

    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        """Draw `[k, n]`."""
        signs = torch.randint(0, 2, (k, n), generator=generator, dtype=torch.float32, device="cpu")
        return (2 * signs - 1) / math.sqrt(k)


class OrthonormalProjection(Projection):
    """A uniformly random k-dimensional subspace: orthonormal rows times √(n/k).

    The economy QR of a normal `[n, k]` costs O(nk²); the factors' signs are fixed, so that the
    rows are distributed uniformly (Mezzadri, 2007).
    """

    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        """Draw `[k, n]`."""
        normal = torch.randn(n, k, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(normal)
        rows: Tensor = (q * r.diagonal().sign()).mT * math.sqrt(n / k)
        return rows.to(torch.float32).contiguous()
