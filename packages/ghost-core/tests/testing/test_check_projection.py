"""The conformance test of projections passes what is right, and sees each fault."""

import pytest
import torch
from torch import Generator, Tensor

from ghost_core import Projection
from ghost_core.testing import (
    check_projection,
)


class Gaussian(Projection):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return torch.randn(k, n, generator=generator) / k**0.5


class Rademacher(Projection):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return (torch.randint(0, 2, (k, n), generator=generator) * 2 - 1) / k**0.5


class Orthonormal(Projection):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        q, r = torch.linalg.qr(torch.randn(n, k, generator=generator))
        return (q * r.diagonal().sign()).mT * (n / k) ** 0.5


class Unscaled(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return super().draw(k, n, generator) * k**0.5


class Shifted(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return super().draw(k, n, generator) + 0.3


class FirstRows(Projection):
    """Takes coordinates, always the same."""

    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return torch.eye(n)[:k] * (n / k) ** 0.5


class Global(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return torch.randn(k, n) / k**0.5


class Peeks(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        torch.rand(1)
        return super().draw(k, n, generator)


class Double(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return super().draw(k, n, generator).double()


class Turned(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return super().draw(k, n, generator).mT


class Infinite(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return super().draw(k, n, generator) / 0


class Reseeds(Gaussian):
    def draw(self, k: int, n: int, generator: Generator) -> Tensor:
        return super().draw(k, n, Generator().manual_seed(generator.initial_seed()))


@pytest.mark.parametrize("kind", [Gaussian, Rademacher, Orthonormal])
def test_projections_without_faults_pass(kind: type[Projection]) -> None:
    check_projection(kind)
    check_projection(kind())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unscaled, r"draw\(k=3, n=7\): E\[PᵀP\] is not the identity"),
        (Shifted, "is not the identity"),
        (FirstRows, "different generators give equal maps"),
        (Global, "equal generators give different maps"),
        (Peeks, "a global random number generator was used"),
        (Double, r"dtype torch\.float64"),
        (Turned, r"draw\(k=1, n=7\): shape \(7, 1\), expected \(1, 7\)"),
        (Infinite, "not finite"),
        (Reseeds, "the same map again and again"),
    ],
)
def test_a_fault_in_a_projection(kind: type[Projection], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_projection(kind)
