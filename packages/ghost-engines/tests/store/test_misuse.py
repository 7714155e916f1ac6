"""What a store is given by mistake is refused in words: what it is, why not, what to give."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from store_kit import FakeEngine, batch, fill, make
from torch import nn

from ghost_core import Batch
from ghost_engines import DotProductEngine, ProjectionEngine, Scores
from ghost_engines.store import GradientStore, StoreError


def refused(message, call, *args, **given):
    """Assert that a call is refused with a message, a reason and a remedy."""
    with pytest.raises(StoreError, match=message) as caught:
        call(*args, **given)
    assert caught.value.reason
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    "engine", [DotProductEngine(nn.Linear(2, 2)), ProjectionEngine, nn.Linear(2, 2), "gaussian"]
)
def test_what_makes_no_rows_is_no_engine_of_a_store(tmp_path, engine):
    error = refused("makes no rows|is a class", GradientStore.create, tmp_path / "g", engine)
    assert "ProjectionEngine(model" in error.remedy
    assert not (tmp_path / "g").exists()
    make(tmp_path / "g", 3)
    refused("makes no rows|is a class", GradientStore.resume, tmp_path / "g", engine)


def opened(ids=None):
    found = Batch(torch.arange(2), True)
    if ids is not None:
        found.finish(batch(0, 2))
    return found


@pytest.mark.parametrize(
    ("given", "message", "remedy"),
    [
        (torch.zeros(2, 6), "a Tensor has no ids and no rows", "engine.collect()"),
        (SimpleNamespace(ids=torch.arange(2)), "a SimpleNamespace has no rows", "engine.collect()"),
        (
            Scores(ids=torch.arange(2), verified=True, by_parameter={}, directions=("v",)),
            "a Scores has no rows",
            "engine.collect()",
        ),
        (opened(), "a Batch has no rows", "batch.result"),
        (opened(ids=[0, 1]), "a Batch has no rows", "batch.result"),
        (SimpleNamespace(ids=[0, 1], rows=torch.zeros(2, 6)), "ids.* list, not a tensor", "tensor"),
        (
            SimpleNamespace(ids=torch.arange(2), rows=np.zeros((2, 6))),
            "rows.* ndarray, not a tensor",
            "tensor",
        ),
    ],
)
def test_what_is_no_rows_cannot_be_appended(tmp_path, given, message, remedy):
    with GradientStore.create(tmp_path / "g", FakeEngine()) as store:
        assert remedy in refused(message, store.append, given).remedy
        refused("loss.* list, not a tensor", store.append, batch(0, 2), loss=[1.0, 2.0])
        assert len(store) == 0


FORMS = {
    "sparse": torch.Tensor.to_sparse,
    "on meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor(list(tensor)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("which", "form"),
    [
        *(("rows", form) for form in FORMS),
        *(("queries", form) for form in FORMS),
        *((which, form) for which in ("ids", "loss", "column") for form in ("sparse", "on meta")),
    ],
)
def test_tensors_that_are_no_table_of_numbers(tmp_path, form, which):
    rows, change = batch(0, 2), FORMS[form]
    given = {"loss": torch.zeros(2), "ids": rows.ids, "rows": rows.rows, "column": torch.ones(2)}
    make(tmp_path / "read", 3)
    with GradientStore.create(tmp_path / "g", FakeEngine(), columns={"n": "float32"}) as store:
        if which == "queries":
            store, act = GradientStore.open(tmp_path / "read"), GradientStore.search
            refused(f"queries .*{form}", act, store, change(rows.rows))
            return
        given[which] = change(given[which])
        put = SimpleNamespace(ids=given["ids"], rows=given["rows"])
        name = "column n" if which == "column" else which
        refused(
            f"{name} .*{form}", store.append, put, given["loss"], columns={"n": given["column"]}
        )
        assert len(store) == 0


@pytest.mark.parametrize("name", ["info", "notes"])
@pytest.mark.parametrize("given", ["run1", ["run1"], {"run1"}, 3])
def test_info_and_notes_are_mappings(tmp_path, name, given):
    error = refused(
        f"^{name} must be a mapping, not", GradientStore.create, tmp_path / "g", FakeEngine(),
        **{name: given},
    )  # fmt: skip
    assert f"{name}={{" in error.remedy


@pytest.mark.parametrize("path", [None, 3, FakeEngine()])
def test_a_path_is_a_path(path):
    for call in (GradientStore.create, GradientStore.resume):
        refused("path of a store", call, path, FakeEngine())
    refused("path of a store", GradientStore.open, path)


def test_a_store_of_other_dimensions_says_so_first(tmp_path):
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(8)])
    with GradientStore.create(tmp_path / "g", ProjectionEngine(model, dim=64)) as store:
        columns = store.k_total
    other = ProjectionEngine(model, dim=256)
    error = refused("would not be those", GradientStore.resume, tmp_path / "g", other)
    told = str(error).splitlines()[0]
    first = f"k_total: {columns} in the store, {other.k_total} now"
    assert re.search(rf"g: {first}; .*; and \d\d more", told)
    assert len(told) < 600 + len(str(tmp_path))
    assert "create" in error.remedy


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_whole_numbers_of_numpy_are_numbers(tmp_path, kind):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=kind(4)) as store:
        fill(store, 9)
        assert torch.equal(store.rows(kind(2), kind(6)), batch(2, 6).rows)
        assert [len(block) for block in store.blocks(kind(4))] == [4, 4, 1]
        found = store.search(torch.randn(1, 6), k=kind(3), block=kind(2))
    assert found.ids.shape == (1, 3)
    GradientStore.resume(tmp_path / "g", FakeEngine()).close()


def test_what_is_no_whole_number_is_refused(tmp_path):
    for unit in (16.0, True, "16"):
        refused(
            "unit must be at least 1, a whole number", GradientStore.create, tmp_path / "g",
            FakeEngine(), unit=unit,
        )  # fmt: skip
    store = make(tmp_path / "g", 9)
    queries = torch.randn(1, 6)
    refused("k must be at least 1, a whole number, not 2.0", store.search, queries, k=2.0)
    refused("a whole number, not 1.5", store.search, queries, block=1.5)
    refused("a whole number, not 0.0", store.rows, 0.0, 2)
    refused("a whole number, not 2.0", store.rows, 0, 2.0)


def test_stores_and_neighbours_say_what_they_are(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine()) as store:
        fill(store, 9)
        store.commit()
        fill(store, 11)
        about = f"{tmp_path / 'g'}, 11 rows of 6 float32"
        assert repr(store) == f"<GradientStore: {about}, 2 not committed, open for writing>"
    assert repr(GradientStore.open(tmp_path / "g")) == f"<GradientStore: {about}>"
    assert repr(store.search(torch.randn(2, 6), k=3)) == "Neighbours(Q=2, k=3, float32)"
