"""What is taken along where gradients are reduced, against the gradients themselves."""

from functools import partial

import pytest
import torch

import ghost_core.algebra.outer as algebra_of_outer
from ghost_core.algebra import Dense, Outer, Owned, PerSampleGradient, Tokens, weighed, weight_of
from ghost_core.algebra.reduced import ALONE, AT_ONCE


def outer(tokens: int) -> Outer:
    """Gradients `[4, 5, 3]` of a linear layer, built alone or contracted."""
    inputs, grads = torch.randn(4, tokens, 1, 3).double(), torch.randn(4, tokens, 1, 5).double()
    return Outer(Tokens(inputs, False), grads, torch.Size([5, 3]))


def dense() -> Dense:
    """Gradients `[4, 5, 3]`, each of two terms."""
    return Dense(torch.randn(4, 2, 5, 3).double())


def owned() -> Owned:
    """Those of two samples with two rows each."""
    return Owned(outer(7), torch.tensor([0, 1, 1, 0]), 2)


@pytest.mark.parametrize(
    "make",
    [partial(outer, 1), partial(outer, 40), dense, owned],
    ids=["one token", "many tokens", "dense", "owned"],
)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("few", [0, algebra_of_outer.FEW])
def test_sum_and_norms_come_along_with_what_is_asked_for(make, norms, total, few, monkeypatch):
    monkeypatch.setattr(algebra_of_outer, "FEW", few)
    gradient: PerSampleGradient = make()
    taken, directions = weighed(gradient), torch.randn(2, 5, 3).double()
    found = taken.reduce(directions, norms=norms, total=total)
    expected = gradient.reduce(directions, norms=norms, total=total)
    for name in ("dots", "squared_norms", "total"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    if found.total is not None:
        found.total.zero_()  # as a hook of the user's may; what was taken along is its own
    weight = weight_of(taken)
    each = gradient.rows if isinstance(gradient, Owned) else gradient
    built = each.materialize()
    torch.testing.assert_close(weight.total, built.sum(0))
    torch.testing.assert_close(weight.squared_norms, built.square().flatten(1).sum(1))


def test_what_was_taken_along_is_not_kept(monkeypatch):
    gradient = weighed(dense())
    gradient.reduce(torch.randn(1, 5, 3).double())
    times: list[int] = []
    materialize = Dense.materialize
    monkeypatch.setattr(Dense, "materialize", lambda self: times.append(1) or materialize(self))
    weight_of(gradient)
    assert not times
    weight_of(gradient)
    assert times


def test_a_type_of_someone_else_stays_as_it_is():
    class Other(Dense):
        pass

    gradient = Other(torch.randn(2, 4, 3))
    assert weighed(gradient) is gradient


def test_gradients_of_one_term_take_nothing_along():
    gradient = Dense(torch.randn(2, 1, 3))
    assert weighed(gradient) is gradient


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_large_gradients_are_reduced_one_by_one(k, transposed, total, one_by_one, monkeypatch):
    called, reduce = [], algebra_of_outer.reduce_outer

    def noted(*args, **options):
        called.append(True)
        return reduce(*args, **options)

    monkeypatch.setattr(algebra_of_outer, "reduce_outer", noted)
    d, p = (300, 220) if one_by_one else (150, 120)  # of which four stay in the cache
    shape = torch.Size([d, p] if transposed else [p, d])
    assert shape.numel() > ALONE
    assert (4 * shape.numel() > AT_ONCE) == one_by_one
    inputs, grads = torch.randn(4, 40, 1, d).double(), torch.randn(4, 40, 1, p).double()
    directions = torch.randn(k, *shape).double() if k else None
    gradient = Outer(Tokens(inputs, transposed), grads, shape)
    found = gradient.reduce(directions, norms=True, total=total)
    assert bool(called) == (one_by_one and (k > 0 or total))  # norms alone take less by tokens
    built = gradient.materialize().flatten(1)
    assert (found.total is None) == (not total)
    if found.total is not None:
        torch.testing.assert_close(found.total, built.sum(0).view(shape))
    assert found.squared_norms is not None
    torch.testing.assert_close(found.squared_norms, built.square().sum(1))
    assert (found.dots is None) == (directions is None)
    if directions is not None:
        torch.testing.assert_close(found.dots, built @ directions.flatten(1).mT)
