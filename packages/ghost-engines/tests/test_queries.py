"""Rows to search with, as they are and as an optimizer sees them."""

import copy
from dataclasses import replace

import pytest
import torch
from engine_kit import squares
from projection_kit import floats, project_frozen

from ghost_core import CaptureError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import (
    GradientStore,
    ProjectionEngine,
    adam_aware,
    model_digest,
    project_dataset,
    project_queries,
)
from ghost_engines.search import score_parts, scores
from ghost_engines.store import StoreError


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


def test_a_store_refuses_queries_of_another_model(tmp_path, mlp):
    data = torch.utils.data.TensorDataset(floats(9, 5))
    store = project_dataset(
        mlp, lambda model, batch: loss(model, batch[0]), data, tmp_path / "one", dim=6, min_dim=2
    ).store
    other, inputs = copy.deepcopy(mlp), floats(3, 5)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0].add_(1e-3)
    engines = [ProjectionEngine.from_manifest(each, store) for each in (mlp, other)]
    own, asked = (project_queries(engine, loss, inputs) for engine in engines)
    assert own.model == model_digest(mlp)
    assert own.manifest == asked.manifest
    near = store.search(own, k=2)
    for ask in (
        lambda: store.search(asked),
        lambda: scores([store], [asked]),
        lambda: score_parts(store, asked, near.ordinals),
        lambda: scores([store, store], [own, asked]),
    ):
        with pytest.raises(StoreError, match="queries are of another model") as caught:
            ask()
        assert "digest=False" in caught.value.remedy
    again = GradientStore.create(tmp_path / "two", engines[0], info={"model": model_digest(mlp)})
    with again, pytest.raises(StoreError, match="batch are of another model"):
        again.append(asked)
    on_purpose = project_queries(engines[1], loss, inputs, digest=False)
    assert on_purpose.model is None
    found = store.search(on_purpose, k=2)
    assert torch.equal(found.scores, store.search(asked.rows, k=2).scores)
    with pytest.raises(CaptureError, match="digest must be True or False"):
        project_queries(engines[1], loss, inputs, digest="no")


@pytest.mark.parametrize("info", [{}, {"model": "gpt2"}, {"model": 3}])
def test_a_store_that_names_no_digest_takes_queries_of_any_model(tmp_path, mlp, info):
    engine = ProjectionEngine(mlp, dim=6, min_dim=2)
    asked = project_queries(engine, loss, floats(3, 5))
    with GradientStore.create(tmp_path, engine, info=info) as store:
        store.append(asked)
        assert store.search(replace(asked, model="0" * 64), k=1).ids.shape == (3, 1)
