"""Rows to search with, as they are and as an optimizer sees them."""

import pytest
import torch
from engine_kit import squares
from projection_kit import floats, project_frozen

from ghost_core import CaptureError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import ProjectionEngine, adam_aware, project_queries


def loss(model, inputs):
    return squares(model(inputs))


def test_queries_are_the_rows_of_a_pass(mlp):
    engine, inputs = ProjectionEngine(mlp, dim=6, min_dim=2, dtype="float64"), floats(3, 5)
    found = project_queries(engine, loss, inputs, ids=[4, 2, 9])
    expected = project_frozen(engine, mlp, inputs)
    assert found.ids.tolist() == [4, 2, 9]
    assert found.manifest == expected.manifest
    assert_within(found.rows, expected.rows, 10 * expected.rows.norm(dim=1)[:, None])
    assert all(parameter.grad is None for parameter in mlp.parameters())


def test_queries_are_preconditioned_before_they_are_projected(mlp):
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        squares(mlp(floats(6, 5))).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    engine, inputs = ProjectionEngine(mlp, dim=6, min_dim=2, dtype="float64"), floats(3, 5)
    seen = {}
    for name, gradient in per_sample_gradients(mlp, squares(mlp(inputs))).items():
        state = optimizer.state[dict(mlp.named_parameters())[name]]
        root = (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8
        seen[name] = gradient * (0.1 / (1 - 0.9**4)) / root
    expected = engine.project(seen)
    found = project_queries(engine, loss, inputs, transform=adam_aware(optimizer))
    assert_within(found.rows, expected, 10 * expected.norm(dim=1)[:, None])


def test_there_are_as_many_ids_as_queries(mlp):
    engine = ProjectionEngine(mlp, dim=6)
    with pytest.raises(CaptureError, match="2 ids for 3 losses"):
        project_queries(engine, loss, floats(3, 5), ids=[1, 2])
