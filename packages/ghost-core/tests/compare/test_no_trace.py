"""A comparison leaves no trace on the model, its gradients or the random numbers."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from ghost_core import CaptureError
from ghost_core.state import RandomState
from ghost_core.testing import GradientHolder
from ghost_core.testing.snapshots import assert_untouched, traces

N, T, D = 6, 5, 4


def everything(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return state, gradients, RandomState.now(), traces(model)


def assert_as_before(before, model):
    state, gradients, randomness, found = before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(each.grad is gradients[name] for name, each in model.named_parameters())
    assert RandomState.now() == randomness
    assert_untouched(found, model, "after a comparison")


@pytest.fixture
def noisy(inputs, layers):
    """A model in training with dropout, running statistics, a frozen parameter and gradients."""
    between = nn.Sequential(nn.Dropout(0.3), nn.InstanceNorm1d(T, track_running_stats=True))
    model = layers(between).double()
    model.second.bias.requires_grad_(False)
    model.first.weight.grad = torch.ones(D, D, dtype=torch.float64)
    random.random(), np.random.rand(), torch.rand(1)
    return model


@pytest.mark.parametrize("how", ["detached", "attached", "frozen"])
@pytest.mark.parametrize("ok", [True, False])
def test_nothing_stays(how, ok, noisy, inputs, registry, doubled, check, own):
    registry = registry if ok else doubled
    engine = GradientHolder(noisy, registry=registry)
    contexts = {"detached": torch.enable_grad, "attached": lambda: engine, "frozen": engine.frozen}
    outside = everything(noisy)
    with contexts[how]():
        before = everything(noisy)
        found = check(noisy, lambda: own(noisy(inputs)), registry=registry)
        if how == "detached":
            assert_as_before(before, noisy)
        else:
            assert {name: each.requires_grad for name, each in noisy.named_parameters()} == {
                name: before[3][f"requires_grad of {name}"] for name, _ in noisy.named_parameters()
            }
    assert found.ok == ok
    assert {each.parameter for each in found.parameters} == {
        "first.weight", "first.bias", "second.weight"
    }  # fmt: skip
    assert_as_before(outside, noisy)


def test_nothing_stays_after_an_exception(noisy, inputs, check, own):
    before, calls = everything(noisy), []

    def losses():
        calls.append(0)
        found = own(noisy(inputs))
        if len(calls) == 3:
            raise KeyError("broken")
        return found

    with pytest.raises(KeyError, match="broken"):
        check(noisy, losses)
    assert_as_before(before, noisy)


def test_an_attached_engine_goes_on_as_before(model, inputs, hold, assert_held, check, own):
    engine = hold(model)
    with engine:
        with engine.batch(range(N)) as first:
            own(model(inputs)).sum().backward()
        found = check(model, lambda: own(model(inputs)))
        with engine.batch(range(N)) as second:
            own(model(inputs)).sum().backward()
    assert found.ok
    assert_held(second.result, first.result.materialize())


def test_it_works_where_gradients_are_disabled(model, inputs, check, own):
    with torch.no_grad():
        assert check(model, lambda: own(model(inputs))).ok


def test_hooks_on_accumulated_gradients_do_not_run(model, inputs, hold, check, own):
    """An optimizer may step in one."""
    seen = []
    model.first.weight.register_post_accumulate_grad_hook(seen.append)
    assert check(model, lambda: own(model(inputs))).ok
    assert not seen
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match=r"first\.weight has a hook that runs when"):
        check(model, lambda: own(model(inputs)))
    assert not seen


def test_a_hook_on_a_gradient_is_refused(model, inputs, check, own):
    model.first.bias.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(CaptureError, match=r"first\.bias has a hook on its gradient"):
        check(model, lambda: own(model(inputs)))
    assert check(model, lambda: own(model(inputs)), exclude="first.bias").ok


def test_an_open_batch_is_refused(model, inputs, hold, check, own):
    with hold(model) as engine, engine.batch(range(N)) as batch:
        with pytest.raises(CaptureError, match="while a batch is open"):
            check(model, lambda: own(model(inputs)))
        own(model(inputs)).sum().backward()
    assert batch.result.n == N
