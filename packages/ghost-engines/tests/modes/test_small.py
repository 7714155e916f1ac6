"""Small parameters that are multiplied together, against each of them alone."""

import pytest
import torch
from torch import nn

from ghost_core import Dense, Outer, Tokens
from ghost_engines import DotProductEngine
from ghost_engines.modes import SmallOnes, small


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("at_once", [0, 100, small.AT_ONCE])
def test_products_are_those_of_each_alone(monkeypatch, k, at_once):
    monkeypatch.setattr(small, "AT_ONCE", at_once)
    ones, expected, found = SmallOnes(), [], []
    for n, shape in [(4, (6,)), (4, (2, 3)), (2, (6,)), (4, (1,)), (4, (6,)), (4, ())]:
        for dtype in (torch.float32, torch.float64):
            gradient = Dense(torch.randn(n, 3, *shape, dtype=dtype))
            directions = torch.randn(k, *shape)
            assert ones.takes(gradient, directions)
            expected.append(1 + gradient.dot(directions))
            found.append(torch.ones_like(expected[-1]))
            ones.add(found[-1].add_, gradient.materialize(), directions)
    ones.multiply()
    ones.multiply()  # nothing waits any more
    torch.testing.assert_close(found, expected)


def test_what_is_cleared_is_gone():
    ones, dots = SmallOnes(), torch.zeros(2, 1)
    ones.add(dots.add_, torch.ones(2, 3), torch.ones(1, 3))
    ones.clear()
    ones.multiply()
    assert not dots.any()


def test_large_ones_and_factors_do_not_wait():
    ones, factor = SmallOnes(), Tokens(torch.ones(2, 1, 1, 3))
    assert not ones.takes(Outer(factor, torch.ones(2, 1, 1, 5), torch.Size([5, 3])), torch.ones(15))
    assert not ones.takes(Dense(torch.ones(2, 1, 3)), torch.ones(small.SMALL // 3 + 1, 3))


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_an_engine_lets_norms_and_biases_wait_and_nothing_else(monkeypatch, mode):
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    engine = DotProductEngine(model, mode=mode, norms=True)
    engine.add_direction("ones", {name: torch.ones_like(p) for name, p in model.named_parameters()})
    monkeypatch.setattr(SmallOnes, "multiply", SmallOnes.clear)
    with engine:
        for _ in range(2):  # in the first, sums are compared with autograd's gradients
            with engine.batch(range(4)) as batch:
                model(torch.randn(4, 3)).square().sum().backward()
    zero = {name for name, dots in batch.result.by_parameter.items() if not dots.any()}
    assert zero == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert all(norms.all() for norms in batch.result.squared_norms.values())
