"""The projections that ghost ships keep the contract, and their own promises."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghost_core.plugins import installed
from ghost_core.testing import check_projection
from ghost_engines.random_projections import (
    GaussianProjection,
    OrthonormalProjection,
    RademacherProjection,
)

KINDS = {
    "gaussian": GaussianProjection,
    "orthonormal": OrthonormalProjection,
    "rademacher": RademacherProjection,
}


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def draw(kind, k, n, seed=0):
    return kind().draw(k, n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", KINDS)
def test_contract(name):
    check_projection(KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_is_offered_under_its_name(name):
    assert installed().projection(name) is KINDS[name]


@pytest.mark.parametrize("name", KINDS)
def test_time_and_memory_grow_with_k_times_n_alone(name):
    """A full QR would build `[n, n]`, 10¹⁰ numbers here."""
    with Largest() as largest:
        drawn = draw(KINDS[name], 4, 100_000)
    assert drawn.shape == (4, 100_000)
    assert 400_000 <= largest.elements <= 800_000


def test_rademacher_entries_are_signs_over_the_root_of_k():
    drawn = draw(RademacherProjection, 12, 50)
    assert drawn.unique().tolist() == pytest.approx([-1 / math.sqrt(12), 1 / math.sqrt(12)])
    assert 200 < (drawn > 0).sum() < 400


def test_gaussian_entries_are_normal():
    entries = draw(GaussianProjection, 16, 10_000).double() * 4
    assert entries.mean().abs() < 6 / 400
    assert (entries.var() - 1).abs() < 6 * math.sqrt(2) / 400
    assert (entries.pow(4).mean() - 3).abs() < 6 * math.sqrt(96) / 400


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 9), (5, 9), (9, 9), (16, 700)])
def test_orthonormal_rows_are_orthogonal(k, n):
    drawn = draw(OrthonormalProjection, k, n).double()
    expected = torch.eye(k, dtype=torch.float64) * n / k
    assert torch.allclose(drawn @ drawn.mT, expected, atol=1e-5 * n / k)


def test_orthonormal_subspaces_are_uniform_with_both_signs():
    """Without fixed signs of R, QR would always give the same sign somewhere."""
    maps = torch.stack([draw(OrthonormalProjection, 3, 3, seed) for seed in range(400)])
    assert (maps.sign().mean(0).abs() < 6 / math.sqrt(400)).all()


@pytest.mark.parametrize("kind", [GaussianProjection, RademacherProjection, OrthonormalProjection])
def test_maps_do_not_depend_on_the_default_dtype(kind):
    def draw():
        return kind().draw(3, 7, torch.Generator().manual_seed(5))

    expected = draw()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
