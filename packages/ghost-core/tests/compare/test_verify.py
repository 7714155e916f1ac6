"""`engine.verify`, whatever the engine is and whether it is attached."""

import pytest
import torch
from torch import nn

from ghost_core import CaptureError, Comparison, Freeze, SamplerRegistry, Tokens, WrongSplitError
from ghost_core.testing import (
    GradientHolder,
    PlainLinear,
    TinyTransformer,
    next_token_losses,
    plain_registry,
)
from ghost_core.tracking import Claim, dotted_name

N, T = 6, 5


class Doubles(PlainLinear):
    """Makes gradients of one sample too large."""

    def gradients(self, call, records, grads):
        grad = grads[0].clone()
        grad[N - 1] *= 1.01
        return super().gradients(call, records, [grad])


class Compresses(GradientHolder):
    def on_input(self, parameter, record):
        if isinstance(record, Tokens):
            return record.compress(torch.eye(record.x.shape[-1], dtype=record.x.dtype))
        return record


@pytest.fixture
def tokens():
    return torch.randint(0, 19, (N, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return TinyTransformer().double().eval()


def test_a_function(hold, model, tokens):
    engine = hold(model, exclude="*.bias")
    for context in (engine, None):
        if context is None:
            found = engine.verify(lambda: next_token_losses(model(tokens), tokens), samples=3)
        else:
            with context:
                found = engine.verify(lambda: next_token_losses(model(tokens), tokens), samples=3)
        assert isinstance(found, Comparison)
        assert found.ok
        assert found.verified
        assert found.samples == (0, 2, N - 1) or found.samples == (0, 3, N - 1)
        assert {check.parameter for check in found.parameters} == engine.tracking.names


def test_a_wrong_sampler_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    known = SamplerRegistry([Claim(dotted_name(nn.Linear), Doubles, "test")])
    engine = GradientHolder(model, registry=known, verify=False)
    x = torch.randn(N, 4, dtype=torch.float64)
    found = engine.verify(lambda: model(x).sin().sum(1))
    assert not found.ok
    assert {check.sample for check in found.wrong} == {N - 1}
    with pytest.raises(WrongSplitError, match=r"wrong: (.|\n)*Doubles"):
        found.raise_if_wrong()


def test_a_coupled_loss_is_found(hold, model, tokens):
    def losses():
        values = next_token_losses(model(tokens), tokens)
        return values / values.max()

    assert not hold(model).verify(losses).ok


def test_engines_that_make_gradients_are_verified_too(model, tokens):
    class Fused(GradientHolder):
        freeze = Freeze.CALL

        def on_gradient(self, pass_, parameter, gradient):
            super().on_gradient(pass_, parameter, gradient)
            return gradient.sum()

    engine = Fused(model, registry=plain_registry())
    with engine:
        assert engine.verify(lambda: next_token_losses(model(tokens), tokens)).ok


def test_engines_that_compress_inputs_are_verified_too(hold, model, tokens):
    engine = Compresses(model, registry=hold(model).selection.registry)
    with engine:
        assert engine.verify(lambda: next_token_losses(model(tokens), tokens)).ok


def test_what_cannot_be_compared(hold, model, tokens):
    engine = hold(model)

    def losses():
        return next_token_losses(model(tokens), tokens)

    function = pytest.raises(CaptureError, match=r"takes a function that computes the losses, not")
    with function:
        engine.verify(losses())
    with engine, function, engine.batch(range(N)):
        engine.verify(losses())
    open_batch = pytest.raises(CaptureError, match=r"while a batch is open")
    with engine, open_batch, engine.batch(range(N)):
        engine.verify(losses)
    with pytest.raises(CaptureError, match=r"tolerance must be between 0 and 1"):
        engine.verify(losses, tolerance=2)
    with engine:  # the hooks are as before
        assert engine.verify(losses).ok
