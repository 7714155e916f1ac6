"""Rows of other engines, and rows that are not verified, next to those of a store."""

from dataclasses import replace

import pytest
import torch
from store_kit import FakeEngine, batch

from ghost_engines import ProjectionEngine
from ghost_engines.store import GradientStore, StoreError


def engine_of(mlp, **changed):
    return ProjectionEngine(mlp, **{"dim": 4, "min_dim": 1, "seed": 1, **changed})


def collected(engine, mlp, ids=(7, 3, 5)):
    torch.manual_seed(0)
    with engine.frozen(), engine.batch(list(ids)):
        mlp(torch.randn(len(ids), 5, dtype=torch.float64)).pow(2).sum().backward()
    return engine.collect()


@pytest.fixture
def store(tmp_path, mlp):
    engine = engine_of(mlp)
    with GradientStore.create(tmp_path / "g", engine) as made:
        made.append(collected(engine, mlp))
        yield made


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 2}, "seed: 1 in the store, 2 now"),
        ({"init": "rademacher"}, 'projection: "gaussian" in the store, "rademacher" now'),
        ({"verify": False}, "verified: true in the store, false now"),
    ],
)
def test_rows_of_another_engine_are_not_stored(store, mlp, changed, told):
    before = store.rows()
    rows = collected(engine_of(mlp, **changed), mlp)
    with pytest.raises(StoreError, match=told) as caught:
        store.append(rows)
    assert caught.value.reason
    assert caught.value.remedy
    assert torch.equal(store.rows(), before)


def test_rows_that_are_not_verified_are_not_stored_among_rows_that_are(store, mlp):
    rows = collected(engine_of(mlp), mlp)
    with pytest.raises(StoreError, match="not verified") as caught:
        store.append(replace(rows, verified=False))
    assert "verify=False" in caught.value.remedy
    assert len(store) == 3
    store.append(replace(rows, ids=rows.ids + 10))
    assert len(store) == 6


def test_an_engine_that_verifies_nothing_may_store_what_it_collects(tmp_path, mlp):
    engine = engine_of(mlp, verify=False)
    with GradientStore.create(tmp_path / "h", engine) as store:
        rows = collected(engine, mlp)
        assert not rows.verified
        store.append(rows)
    assert len(store) == 3


@pytest.mark.parametrize("changed", [{"seed": 2}, {"init": "orthonormal"}])
def test_a_search_with_rows_of_another_engine_is_refused(store, mlp, changed):
    queries = collected(engine_of(mlp, **changed), mlp)
    with pytest.raises(StoreError, match="not of the kind that the store holds") as caught:
        store.search(queries)
    assert caught.value.reason
    assert caught.value.remedy


@pytest.mark.parametrize("changed", [{}, {"verify": False}, {"dtype": torch.float64}])
def test_a_search_takes_what_a_like_engine_collects_and_plain_tensors(store, mlp, changed):
    queries = collected(engine_of(mlp, **changed), mlp)
    found = store.search(queries, k=1, by="cosine")
    assert torch.equal(found.ids.flatten(), queries.ids)
    again = store.search(queries.rows, k=1, by="cosine")
    assert torch.equal(found.ids, again.ids)


def test_rows_that_do_not_say_where_they_are_from_are_taken(tmp_path):
    with GradientStore.create(tmp_path / "h", FakeEngine()) as store:
        store.append(batch(0, 3))
        found = store.search(batch(0, 2), k=1)
    assert found.ids.shape == (2, 1)
