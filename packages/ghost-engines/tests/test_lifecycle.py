"""Attaching, batches, and leaving, with an engine that has directions."""

import numpy as np
import pytest
import torch
from engine_kit import squares, train
from torch import nn

from ghost_core import CaptureError, UnbalancedError, UnknownNameError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import DotProductEngine, ProjectionEngine

# Refusals


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_wrong_number_of_ids_is_refused(count, mlp, inputs, engine):
    with pytest.raises(CaptureError), engine, engine.batch(range(count)):
        squares(mlp(inputs)).sum().backward()


@pytest.mark.parametrize(
    "ids",
    [
        [0.0, 1.0, 2.0, 3.0],
        [True, False, True, False],
        torch.zeros(4, 1, dtype=torch.int64),
        torch.tensor(3),
        ["a", "b", "c", "d"],
        np.zeros(4),
        None,
    ],
    ids=["floats", "flags", "column", "scalar", "strings", "array of floats", "none"],
)
def test_ids_must_be_one_integer_per_sample(ids, mlp, inputs, engine):
    with pytest.raises(CaptureError, match="one integer per sample"), engine, engine.batch(ids):
        squares(mlp(inputs)).sum().backward()


@pytest.mark.parametrize(
    "ids",
    [[7, -5, 7, 2**40], (7, -5, 7, 2**40), torch.tensor([7, -5, 7, 2**40])],
    ids=["list", "tuple", "tensor"],
)
def test_ids_come_back_as_given(ids, mlp, inputs, engine):
    with engine, engine.batch(ids) as batch:
        squares(mlp(inputs)).sum().backward()
    assert batch.result.ids.tolist() == [7, -5, 7, 2**40]
    assert batch.result.ids.dtype == torch.int64


def test_ids_are_copied(mlp, inputs, engine):
    ids = np.arange(4, dtype=np.int32)
    with engine, engine.batch(ids) as batch:
        squares(mlp(inputs)).sum().backward()
        ids[:] = 9
    assert batch.result.ids.tolist() == [0, 1, 2, 3]


def test_unknown_option_is_a_type_error(mlp):
    with pytest.raises(TypeError, match="layer_names"):
        DotProductEngine(mlp, layer_names="0")


def test_unknown_layer_lists_what_exists(mlp):
    with pytest.raises(UnknownNameError, match=r"Available: 0, 0\.bias, 0\.weight, 2"):
        DotProductEngine(mlp, layers="1")


def test_batch_needs_the_engine_attached(mlp, inputs, engine):
    with pytest.raises(CaptureError, match="attach the engine first"), engine.batch(range(4)):
        squares(mlp(inputs)).sum().backward()
    with engine:
        pass
    with pytest.raises(CaptureError, match="attach the engine first"), engine.batch(range(4)):
        squares(mlp(inputs)).sum().backward()


def test_attaching_twice_is_refused_and_harmless(mlp, inputs, engine, assert_scores):
    with engine:
        with pytest.raises(CaptureError, match="attached already"), engine:
            pass
        with pytest.raises(CaptureError), engine.frozen():
            pass
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
    assert torch.equal(batch.result.total, train(engine, mlp, inputs).total)
    assert not any(module._forward_hooks for module in mlp.modules())


def test_opening_a_batch_twice_is_refused(mlp, inputs, engine):
    with engine:
        with engine.batch(range(4)) as outer:
            with pytest.raises(CaptureError, match="open already"), engine.batch(range(4)):
                pass
            squares(mlp(inputs)).sum().backward()
        assert torch.equal(outer.result.total, train_attached(engine, mlp, inputs))


def train_attached(engine, model, inputs):
    with engine.batch(range(len(inputs))) as batch:
        squares(model(inputs)).sum().backward()
    return batch.result.total


def test_parameter_frozen_after_attaching_is_refused(mlp, inputs, engine):
    with engine:
        train_attached(engine, mlp, inputs)
        mlp[2].bias.requires_grad_(False)
        with pytest.raises(CaptureError, match=r"2\.bias no longer require"):
            train_attached(engine, mlp, inputs)


def test_parameter_unfrozen_after_attaching_is_refused(mlp, inputs):
    mlp[2].bias.requires_grad_(False)
    engine = DotProductEngine(mlp)
    engine.add_direction("val", lambda: squares(mlp(inputs + 1)).mean())
    with engine:
        train_attached(engine, mlp, inputs)
        mlp[2].bias.requires_grad_(True)
        with pytest.raises(CaptureError, match=r"2\.bias requires gradients"):
            train_attached(engine, mlp, inputs)


def test_flags_of_parameters_left_out_may_change(mlp, inputs):
    engine = DotProductEngine(mlp, exclude="2.bias")
    engine.add_direction("val", lambda: squares(mlp(inputs + 1)).mean())
    with engine:
        before = train_attached(engine, mlp, inputs)
        mlp[2].bias.requires_grad_(False)
        assert torch.equal(train_attached(engine, mlp, inputs), before)


def change_module(model):
    model[2] = nn.Linear(7, 3).double()


def change_parameter(model):
    model[2].weight = nn.Parameter(torch.zeros(3, 7, dtype=torch.float64))


def freeze(model):
    model[2].bias.requires_grad_(False)


def add_module(model):
    model.append(nn.Linear(3, 3).double())


# A parameter of the same shape in the same module is found by its name: nothing to refuse.
@pytest.mark.parametrize("change", [change_module, freeze, add_module])
def test_model_changed_after_the_engine_was_made_is_refused(change, mlp, engine):
    change(mlp)
    with pytest.raises(CaptureError, match="make a new engine"), engine:
        pass


@pytest.mark.parametrize("change", [change_module, freeze, add_module])
def test_model_changed_is_refused_beside_another_engine_too(change, mlp, inputs, engine):
    change(mlp)
    current = DotProductEngine(mlp)
    current.add_direction("loss", lambda: squares(mlp(inputs)).mean())
    alone = train(current, mlp, inputs).total
    with current:
        with pytest.raises(CaptureError), engine:
            train_attached(engine, mlp, inputs)
        assert torch.equal(train_attached(current, mlp, inputs), alone)


def test_replaced_parameter_is_scored(mlp, inputs, engine, draw_directions, assert_scores):
    change_parameter(mlp)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)), ["2.bias", "2.weight"])
    scores = train(engine, mlp, inputs)
    direction = draw_directions(mlp, 1)["random 0"]
    for name, gradients in expected.items():
        dots = gradients.flatten(1) @ direction[name].flatten()
        assert_within(scores.by_parameter[name][:, 0], dots, dots.norm(), what=name)


def test_collect_before_any_batch_is_refused(engine):
    with pytest.raises(CaptureError, match="no batch yet"):
        engine.collect()


def fail_after(loss):
    loss.backward()
    raise ZeroDivisionError


def test_result_of_an_open_or_failed_batch_is_refused(mlp, inputs, engine):
    with engine:
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
            for read in (lambda: batch.result, engine.collect):
                with pytest.raises(CaptureError, match="no result"):
                    read()
        assert batch.result.total.any()
        with pytest.raises(ZeroDivisionError), engine.batch(range(4)) as failed:
            fail_after(squares(mlp(inputs)).sum())
        for read in (lambda: failed.result, engine.collect):
            with pytest.raises(CaptureError, match="no result"):
                read()


def test_batch_without_backward_or_forward_is_refused(mlp, inputs, engine):
    with engine:
        with pytest.raises(CaptureError, match="was not called"), engine.batch(range(4)):
            pass
        with pytest.raises(CaptureError, match="no gradient arrived"), engine.batch(range(4)):
            mlp(inputs)
        with pytest.raises(CaptureError, match="outside a call"), engine.batch(range(4)):
            mlp[2](mlp[0](inputs))


def test_backward_after_the_batch_is_refused(mlp, inputs, engine):
    with engine:
        with pytest.raises(CaptureError, match="no gradient arrived"), engine.batch(range(4)):
            loss = squares(mlp(inputs)).sum()
        with pytest.raises(CaptureError, match="after its batch was closed"):
            loss.backward()


def test_scores_say_whether_the_split_was_verified(mlp, inputs):
    for verify in (True, False):
        engine = DotProductEngine(mlp, verify=verify)
        engine.add_direction("loss", lambda: squares(mlp(inputs)).mean())
        assert train(engine, mlp, inputs).verified is verify


@pytest.mark.parametrize("compresses_first", [False, True])
def test_what_does_not_add_up_is_refused_beside_an_engine_that_compresses_inputs(
    mlp, inputs, engine, compresses_first
):
    beside = ProjectionEngine(mlp, dim=4, min_dim=1, seed=0, loss_weights="sum")
    first, last = (beside, engine) if compresses_first else (engine, beside)
    penalty = mlp[0].weight.square().sum()  # from before the batch, which nothing else shows
    refused = pytest.raises(UnbalancedError, match=r"0\.weight")
    with first, last, refused, first.batch(range(4)), last.batch(range(4)):
        (squares(mlp(inputs)).sum() + penalty).backward()
