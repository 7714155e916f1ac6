"""`engine.verify`, with a function and with the losses of an open batch."""

import pytest
import torch
from torch import nn

from ghost_core import CaptureError, Freeze, SamplerRegistry, Tokens, Verification, WrongSplitError
from ghost_core.registry import Claim, dotted_name
from ghost_core.testing import (
    GradientHolder,
    PlainLinear,
    TinyTransformer,
    next_token_losses,
    per_sample_gradients,
    plain_registry,
)

N, T = 6, 5


class Doubles(PlainLinear):
    """Makes gradients of one sample too large."""

    def gradients(self, call, records, grads):
        grad = grads[0].clone()
        grad[N - 1] *= 1.01
        return super().gradients(call, records, [grad])


class Compresses(GradientHolder):
    def on_input(self, site, record):
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
        assert isinstance(found, Verification)
        assert found.ok
        assert found.verified
        assert found.samples == (0, 2, N - 1) or found.samples == (0, 3, N - 1)
        assert {check.parameter for check in found.parameters} == engine.tracking.names


def test_losses_of_an_open_batch(hold, assert_held, model, tokens):
    engine = hold(model)
    expected = per_sample_gradients(model, next_token_losses(model(tokens), tokens))
    with engine, engine.batch(range(N)) as batch:
        losses = next_token_losses(model(tokens), tokens)
        found = engine.verify(losses)
        assert all(parameter.grad is None for parameter in model.parameters())
        losses.sum().backward()
    assert found.ok
    assert found.verified
    assert "exact: the gradients of 6 of 6 samples agree" in found.verdict
    assert {check.parameter for check in found.parameters} == set(expected)
    assert_held(batch.result, expected)  # what was compared is not counted


def test_a_wrong_sampler_is_found_in_an_open_batch(tokens):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    known = SamplerRegistry([Claim(dotted_name(nn.Linear), Doubles, "test")])
    engine = GradientHolder(model, registry=known, verify=False)
    x = torch.randn(N, 4, dtype=torch.float64)
    with engine, engine.batch(range(N)):
        losses = model(x).sin().sum(1)
        found = engine.verify(losses)
        losses.sum().backward()
    assert not found.ok
    assert {check.sample for check in found.wrong} == {N - 1}
    with pytest.raises(
        WrongSplitError, match=r"wrong: (.|\n)*Doubles(.|\n)*outside of engine\.batch"
    ):
        found.raise_if_wrong()


def test_a_coupled_loss_is_found_in_an_open_batch(hold, model, tokens):
    engine = hold(model)
    with engine, engine.batch(range(N)):
        losses = next_token_losses(model(tokens), tokens)
        assert not engine.verify(losses / losses.max()).ok
        losses.sum().backward()


def test_engines_that_make_gradients_are_not_asked_for_them(model, tokens):
    class Fused(GradientHolder):
        freeze = Freeze.CALL

        def on_gradient(self, pass_, site, gradient):
            super().on_gradient(pass_, site, gradient)
            return gradient.sum()

    engine = Fused(model, registry=plain_registry())
    with engine, engine.batch(range(N)):
        losses = next_token_losses(model(tokens), tokens)
        making = pytest.raises(CaptureError, match=r"makes the weight gradients")
        with making:
            engine.verify(losses)
        losses.sum().backward()


def test_what_cannot_be_compared(hold, model, tokens):
    engine = hold(model)

    def losses():
        return next_token_losses(model(tokens), tokens)

    with pytest.raises(CaptureError, match=r"call verify\(\) inside of engine\.batch"):
        engine.verify(losses())
    frozen = pytest.raises(CaptureError, match=r"parameters are frozen")
    with engine.frozen(), frozen, engine.batch(range(N)):
        engine.verify(losses())
    with engine, engine.batch(range(2 * N)):
        first, second = losses(), losses()
        with pytest.raises(CaptureError, match=r"losses are \[12\], and a pass of 6 samples"):
            engine.verify(torch.cat([first, second]))
        with pytest.raises(CaptureError, match=r"give owners to engine\.batch"):
            engine.verify(first, owners={"rows": tokens})
        with pytest.raises(CaptureError, match=r"tolerance must be between 0 and 1"):
            engine.verify(first, tolerance=2)
        (first + second).sum().backward()
    compressing = Compresses(model, registry=engine.selection.registry)
    with compressing, compressing.batch(range(N)):
        computed = losses()
        with pytest.raises(CaptureError, match=r"compressed in the forward pass: give"):
            compressing.verify(computed)
        computed.sum().backward()
    with engine:  # the hooks are as before
        assert engine.verify(losses).ok
