"""What engines, in-run values and digests are given by mistake is refused in words."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ghost_core import CaptureError
from ghost_engines import (
    DotProductEngine,
    InRunValues,
    ProjectionEngine,
    model_digest,
    project_queries,
)


def refused(message, call, *args, **given):
    """Assert that a call is refused with a message, a reason and a remedy."""
    with pytest.raises(CaptureError, match=message) as caught:
        call(*args, **given)
    assert caught.value.reason
    assert caught.value.remedy
    return caught.value


@pytest.fixture
def optimizer(mlp):
    return torch.optim.SGD(mlp.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda mlp, optimizer: ProjectionEngine, "ProjectionEngine is a class"),
        (lambda mlp, optimizer: DotProductEngine, "DotProductEngine is a class"),
        (lambda mlp, optimizer: ProjectionEngine(mlp, dim=4), "ProjectionEngine scores no batches"),
        (lambda mlp, optimizer: mlp, "Sequential scores no batches"),
        (lambda mlp, optimizer: optimizer, "SGD scores no batches"),
    ],
)
def test_values_need_an_engine_that_scores(given, message, mlp, optimizer):
    error = refused(message, InRunValues, given(mlp, optimizer), optimizer)
    assert "DotProductEngine(model)" in error.remedy


def test_values_say_what_they_are(mlp, optimizer, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("val", lambda: mlp(inputs).sum())
    values = InRunValues(engine, optimizer)
    assert repr(values) == "<InRunValues: 0 samples, 0 steps>"
    with engine, engine.batch(range(4)):
        mlp(inputs).sum().backward()
    optimizer.step()
    assert repr(values) == "<InRunValues: 4 samples, 1 steps>"
    optimizer.zero_grad()
    with engine.frozen(), engine.batch(range(4)):
        mlp(inputs).sum().backward()
    assert repr(values) == "<InRunValues: 4 samples, 1 steps, 1 batches without one>"


@pytest.mark.parametrize("given", ["gpt2", nn.Linear, None])
@pytest.mark.parametrize("call", [model_digest, DotProductEngine, ProjectionEngine])
def test_a_model_is_a_module(call, given):
    error = refused("must be a torch.nn.Module, not", call, given)
    assert "model" in error.remedy


class Bound:
    def loss(self, model):
        raise AssertionError


@pytest.mark.parametrize(
    "closure",
    [lambda model: None, lambda model, batch: None, lambda *, model: None, Bound().loss],
    ids=["one", "two", "by name", "of an object"],
)
def test_a_closure_that_takes_arguments_is_refused(closure, mlp):
    engine = DotProductEngine(mlp)
    error = refused("direction 'val': .* arguments?", engine.add_direction, "val", closure)
    assert "model" in error.reason
    assert "lambda: " in error.remedy
    assert engine.directions == ()


def test_arguments_that_are_bound_or_have_defaults_are_no_matter(mlp, inputs):
    def loss(model, scale=1.0, *others, **named):
        return scale * model(inputs).sum()

    engine = DotProductEngine(mlp)
    for closure in (functools.partial(loss, mlp), lambda model=mlp: loss(model), torch.zeros):
        engine.add_direction("val", closure)


@pytest.mark.parametrize("refresh", [1.5, True, "2"])
def test_batches_are_whole_numbers(refresh, mlp):
    engine = DotProductEngine(mlp)
    refused("a whole number", engine.add_direction, "val", lambda: None, refresh=refresh)


def test_whole_numbers_of_numpy_are_numbers(mlp):
    engine = DotProductEngine(mlp)
    engine.add_direction("val", lambda: mlp(torch.ones(1, 5).double()).sum(), refresh=np.int64(2))
    given = {"dim": np.int64(4), "min_dim": np.int32(2), "seed": np.int64(3)}
    projections = ProjectionEngine(mlp, **given)
    same = ProjectionEngine(mlp, **{name: int(value) for name, value in given.items()})
    assert projections.manifest() == same.manifest()
    assert torch.equal(projections.maps("0.weight")[1], same.maps("0.weight")[1])
    assert ProjectionEngine(mlp, total_dim=np.int64(200)).k_total <= 200
    for wrong in ({"dim": 4.0}, {"total_dim": "20"}, {"min_dim": True}, {"seed": 1.0}):
        refused("a whole number", ProjectionEngine, mlp, **wrong)


class Reentrant(nn.Linear):
    """Runs again where its gradient is made."""

    def forward(self, x):
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)


def test_reentrant_checkpoints_are_refused_where_a_direction_is_made():
    model, x = Reentrant(3, 2), torch.randn(4, 3)
    engine = DotProductEngine(model)
    engine.add_direction("val", lambda: model(x).sum())
    with pytest.raises(CaptureError, match="use_reentrant=False"), engine, engine.batch(range(4)):
        pass


def test_reentrant_checkpoints_are_refused_where_queries_are_projected():
    engine = ProjectionEngine(Reentrant(3, 2), dim=2)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        project_queries(engine, lambda model, x: model(x).square().sum(1), torch.randn(4, 3))
