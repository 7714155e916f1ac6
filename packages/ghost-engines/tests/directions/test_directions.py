"""Directions: when closures are called, what they leave alone, and which are refused."""

import copy
import random

import numpy as np
import pytest
import torch
from engine_kit import gradient, squares, train
from torch import nn

from ghost_core import CaptureError, UnknownNameError
from ghost_core.testing import per_sample_gradients
from ghost_engines import DotProductEngine

# Renewal of closures


class Counted:
    """A validation loss that counts its calls."""

    def __init__(self, model, inputs):
        self.model, self.inputs, self.calls = model, inputs, 0

    def __call__(self):
        self.calls += 1
        return squares(self.model(self.inputs)).mean()


@pytest.mark.parametrize(
    ("refresh", "calls"), [(None, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 1, 1, 2, 2, 2, 3]), (9, [1] * 7)]
)
def test_refresh_renews_every_so_many_batches(refresh, calls, mlp, inputs, assert_scores):
    closure, seen, direction = Counted(mlp, inputs + 1), [], {}
    engine = DotProductEngine(mlp)
    engine.add_direction("loss", closure, refresh=refresh)
    with engine:
        for step in range(7):
            if step == 0 or calls[step] != calls[step - 1]:
                direction = gradient(mlp, squares(mlp(inputs + 1)).mean())
            expected = per_sample_gradients(mlp, squares(mlp(inputs)))
            with engine.batch(range(4)) as batch:
                squares(mlp(inputs)).sum().backward()
            seen.append(closure.calls)
            assert_scores(batch.result, expected, {"loss": direction})
            with torch.no_grad():
                for parameter in mlp.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    assert seen == calls


def test_each_direction_is_renewed_in_its_own_time(mlp, inputs):
    often, seldom = Counted(mlp, inputs), Counted(mlp, inputs)
    engine = DotProductEngine(mlp)
    engine.add_direction("often", often, refresh=2)
    engine.add_direction("seldom", seldom, refresh=3)
    for _ in range(7):
        train(engine, mlp, inputs)
    assert (often.calls, seldom.calls) == (4, 3)


def test_failing_closure_leaves_no_half_renewed_directions(mlp, inputs, assert_scores):
    fails = [False]

    def sometimes():
        if fails[0]:
            raise OSError("no validation data")
        return squares(mlp(inputs + 2)).mean()

    engine = DotProductEngine(mlp)
    engine.add_direction("steady", lambda: squares(mlp(inputs + 1)).mean())
    engine.add_direction("sometimes", sometimes)
    train(engine, mlp, inputs)
    with torch.no_grad():
        mlp[0].weight.mul_(2.0)
    fails[0] = True
    with pytest.raises(OSError, match="no validation data"):
        train(engine, mlp, inputs)
    fails[0] = False
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    directions = {
        "steady": gradient(mlp, squares(mlp(inputs + 1)).mean()),
        "sometimes": gradient(mlp, squares(mlp(inputs + 2)).mean()),
    }
    assert_scores(train(engine, mlp, inputs), expected, directions)


def test_closure_leaves_no_trace_on_the_training():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)
    ).double()
    model[1].eval()  # in training mode it would mix the samples
    inputs = torch.randn(8, 5, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    modes = []

    def noisy():
        modes.append([module.training for module in model.modules()])
        model.train()
        random.random()
        noise = torch.as_tensor(np.random.normal(size=(8, 5)))
        return squares(model(inputs + noise + torch.randn(8, 5))).mean()

    engine = DotProductEngine(model, exclude="1")
    engine.add_direction("noisy", noisy)
    before = {
        "torch": torch.get_rng_state(),
        "numpy": torch.as_tensor(np.random.get_state()[1].astype(np.int64)),
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
        **{name: p.grad.clone() for name, p in model.named_parameters()},
    }
    python = random.getstate()
    with engine, engine.batch(range(8)):
        after = {
            "torch": torch.get_rng_state(),
            "numpy": torch.as_tensor(np.random.get_state()[1].astype(np.int64)),
            **dict(model.named_buffers()),
            **{name: p.grad for name, p in model.named_parameters()},
        }
        assert after.keys() == before.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        assert random.getstate() == python
        assert [model.training, model[1].training, model[2].training] == [True, False, True]
        squares(model(inputs)).sum().backward()
    assert modes == [[False] * 5]


def test_closure_is_left_alone_by_other_engines(mlp, inputs, engine, assert_scores):
    """A closure runs the model while another engine has a batch open."""
    closure = Counted(mlp, inputs + 1)
    renewed = DotProductEngine(mlp)
    renewed.add_direction("loss", closure)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    direction = gradient(mlp, squares(mlp(inputs + 1)).mean())
    with engine, renewed, engine.batch(range(4)) as first, renewed.batch(range(4)) as second:
        squares(mlp(inputs)).sum().backward()
    assert_scores(second.result, expected, {"loss": direction})
    assert torch.equal(first.result.total, train(engine, mlp, inputs).total)


def test_one_closure_of_several_runs_the_model_as_it_is_without_other_engines(
    mlp, inputs, engine, draw_directions
):
    """Another direction is kept, and a batch of another engine is open."""
    closure, lasting = Counted(mlp, inputs + 1), draw_directions(mlp, 1)
    renewed = DotProductEngine(mlp)
    renewed.add_direction("loss", closure, refresh=1)
    for name, direction in lasting.items():
        renewed.add_direction(name, direction)
    with engine, renewed:
        for step in range(2):
            with engine.batch(range(4)), renewed.batch(range(4)):
                squares(mlp(inputs)).sum().backward()
            assert closure.calls == step + 1


# Refusals


def test_no_direction_is_refused(mlp, inputs):
    engine = DotProductEngine(mlp)
    with pytest.raises(CaptureError, match="add_direction"):
        train(engine, mlp, inputs)


def test_unknown_parameter_lists_what_exists(mlp, draw_directions):
    direction = draw_directions(mlp, 1)["random 0"]
    direction["0.wieght"] = direction.pop("0.weight")
    with pytest.raises(UnknownNameError) as error:
        DotProductEngine(mlp).add_direction("typo", direction)
    assert "did you mean '0.weight'?" in str(error.value)
    assert "0.bias, 0.weight, 2.bias, 2.weight" in str(error.value)


def without(direction, name):
    return {key: value for key, value in direction.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: without(given, "2.bias"), r"no tensor for 2\.bias"),
        (lambda given: {**given, "2.bias": torch.zeros(4)}, r"shape \(4,\) for 2\.bias"),
        (lambda given: {**given, "2.bias": torch.zeros(1, 3)}, r"shape \(1, 3\) for 2\.bias"),
        (lambda given: {**given, "2.bias": torch.full((3,), torch.nan)}, r"not finite at 2\.bias"),
        (lambda given: {**given, "2.bias": torch.full((3,), torch.inf)}, r"not finite at 2\.bias"),
        (lambda given: list(given.values()), "a closure or a mapping of tensors, not list"),
    ],
    ids=["missing", "shape", "axes", "nan", "inf", "list"],
)
def test_wrong_tensors_are_refused(change, message, mlp, draw_directions):
    engine = DotProductEngine(mlp)
    with pytest.raises(CaptureError, match=message):
        engine.add_direction("wrong", change(draw_directions(mlp, 1)["random 0"]))
    assert engine.directions == ()


@pytest.mark.parametrize(
    ("closure", "described"),
    [
        (lambda model, inputs: model(inputs), r"shape \(4, 3\) with a gradient"),
        (lambda model, inputs: model(inputs).sum().detach(), "without a gradient"),
        (lambda model, inputs: torch.tensor(1.0), "without a gradient"),
        (lambda model, inputs: model(inputs).sum().item(), "float"),
        (lambda model, inputs: None, "NoneType"),
    ],
    ids=["not a scalar", "detached", "constant", "number", "nothing"],
)
def test_losses_without_a_gradient_are_refused(closure, described, mlp, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("wrong", lambda: closure(mlp, inputs))
    with pytest.raises(CaptureError, match=f"direction 'wrong'.*{described}"):
        train(engine, mlp, inputs)


def test_loss_of_another_model_is_refused(mlp, inputs):
    other = copy.deepcopy(mlp)
    engine = DotProductEngine(mlp)
    engine.add_direction("other", lambda: squares(other(inputs)).mean())
    with pytest.raises(CaptureError, match="direction 'other'"):
        train(engine, mlp, inputs)


def test_closure_whose_gradient_is_not_finite_is_refused(mlp, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("nan", lambda: (squares(mlp(inputs)) * 0).mean().sqrt())
    with pytest.raises(CaptureError, match="direction 'nan' is not finite at"):
        train(engine, mlp, inputs)


def test_closure_whose_loss_is_not_finite_is_refused(mlp, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("loss", lambda: squares(mlp(inputs)).mean() * torch.nan)
    with pytest.raises(CaptureError, match="direction 'loss': the closure's loss is nan"):
        train(engine, mlp, inputs)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "returned",
    [lambda loss: loss, lambda loss: None, torch.detach],
    ids=["loss", "nothing", "detached"],
)
def test_closure_that_calls_backward_is_told_so(returned, keep, mlp, inputs):
    def closure():
        loss = squares(mlp(inputs)).mean()
        loss.backward(retain_graph=keep)
        return returned(loss)

    engine = DotProductEngine(mlp)
    engine.add_direction("loss", closure)
    with pytest.raises(CaptureError, match="direction 'loss': the closure called backward"):
        train(engine, mlp, inputs)
    assert all(parameter.grad is None for parameter in mlp.parameters())


# Other kinds of closures


def test_closure_may_return_the_direction_itself(mlp, inputs, draw_directions, assert_scores):
    drawn, calls = draw_directions(mlp, 3), []

    def closure():
        calls.append(1)
        return list(drawn.values())[len(calls) - 1]

    engine = DotProductEngine(mlp)
    engine.add_direction("made", closure, refresh=2)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    for at in range(4):
        assert_scores(train(engine, mlp, inputs), expected, {"made": drawn[f"random {at // 2}"]})
    engine.add_direction("made", lambda: {"0.bias": torch.ones(7)})
    with pytest.raises(CaptureError, match=r"direction 'made' has no tensor for 0\.weight"):
        train(engine, mlp, inputs)


@pytest.mark.parametrize("training", [False, True])
def test_closure_runs_in_evaluation_mode_or_as_the_model_is(training, inputs):
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)).double()
    model[2].eval()
    modes = []

    def closure():
        modes.append([module.training for module in model])
        return squares(model(inputs)).mean()

    engine = DotProductEngine(model)
    engine.add_direction("loss", closure, training=training)
    train(engine, model, inputs)
    assert modes == [[training, training, False]]
    assert [module.training for module in model] == [True, True, False]
    zeros = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    with pytest.raises(CaptureError, match="training=True goes with a closure"):
        engine.add_direction("given", zeros, training=True)


@pytest.mark.parametrize("refresh", [0, -1])
def test_refresh_must_be_positive(refresh, mlp):
    with pytest.raises(CaptureError, match=f"not {refresh}"):
        DotProductEngine(mlp).add_direction("loss", lambda: torch.zeros(()), refresh=refresh)


def test_refresh_goes_with_closures_only(mlp, draw_directions):
    with pytest.raises(CaptureError, match="refresh goes with a closure"):
        DotProductEngine(mlp).add_direction("given", draw_directions(mlp, 1)["random 0"], refresh=2)
