"""Creating, resuming and closing a store, and what it refuses."""

import json
import logging
import pickle

import pytest
import torch
from store_kit import DTYPES, FakeEngine, assert_holds, batch, fill, make

from ghost_core import GhostError
from ghost_engines.store import (
    DamagedStoreError,
    DataFile,
    GradientStore,
    Manifest,
    StoredRows,
    StoreError,
)
from ghost_engines.store.listing import shard_path

# Creating, resuming, closing


def test_create_makes_missing_folders_and_leaves_other_files_alone(tmp_path):
    root = tmp_path / "run" / "g"
    root.mkdir(parents=True)
    (root / "config.tmp").write_text("mine")
    make(root, 3)
    make(tmp_path / "a/b/c", 3)
    assert (root / "config.tmp").read_text() == "mine"


def test_create_refuses_a_store_that_exists_and_names_the_ways_on(tmp_path):
    make(tmp_path / "g", 3)
    with pytest.raises(StoreError, match=r"resume\(.*open\("):
        GradientStore.create(tmp_path / "g", FakeEngine())
    assert_holds(GradientStore.open(tmp_path / "g"), 3)


def test_create_refuses_a_file_and_shards_of_unknown_origin(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        GradientStore.create(tmp_path / "file", FakeEngine())
    make(tmp_path / "g", 3)
    (tmp_path / "g/manifest.json").unlink()
    with pytest.raises(DamagedStoreError, match=r"manifest\.json is missing"):
        GradientStore.create(tmp_path / "g", FakeEngine())


@pytest.mark.parametrize(
    ("engine", "given", "message"),
    [
        (FakeEngine(), {"unit": 0}, "unit must be at least 1"),
        (FakeEngine(k_total=0), {}, "k_total must be at least 1"),
        (FakeEngine(torch.int8), {}, "int8 cannot be stored"),
        (FakeEngine(), {"info": {"model": object()}}, "info has a value without a JSON form"),
        (FakeEngine(), {"info": {"lr": float("nan")}}, "info has a value without a JSON form"),
    ],
)
def test_create_refuses_what_it_cannot_write(tmp_path, engine, given, message):
    with pytest.raises(StoreError, match=message):
        GradientStore.create(tmp_path / "g", engine, **given)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("first", [1, 3, 4, 6, 8])
def test_resume_goes_on_after_the_committed_rows(tmp_path, first):
    make(tmp_path / "g", first)
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        assert store.committed == first
        assert_holds(store, first)
        fill(store, 13, step=3)
    read = GradientStore.open(tmp_path / "g")
    assert_holds(read, 13)
    read.verify()


def test_resume_lists_every_entry_that_differs(tmp_path):
    make(tmp_path / "g", 3, info={"model": "abc"})
    layers = FakeEngine().layers
    layers[1]["k_left"] = 3
    with pytest.raises(StoreError) as caught:
        GradientStore.resume(tmp_path / "g", FakeEngine(torch.float16, 8, 43, layers))
    for line in (
        'dtype: "float32" in the store, "float16" now',
        "k_total: 6 in the store, 8 now",
        "engine.seed: 42 in the store, 43 now",
        "engine.layers[1].k_left: 2 in the store, 3 now",
        'info.model: "abc" in the store, absent now',
    ):
        assert line in str(caught.value)
    assert "engine.layers[0]" not in str(caught.value)
    with pytest.raises(StoreError, match="2 entries in the store, 1 now"):
        GradientStore.resume(tmp_path / "g", FakeEngine(layers=layers[:1]), info={"model": "abc"})


def test_resume_takes_the_same_info_and_any_notes(tmp_path):
    make(tmp_path / "g", 3, info={"model": "abc"}, notes={"who": "me"})
    with GradientStore.resume(tmp_path / "g", FakeEngine(), info={"model": "abc"}) as store:
        assert store.manifest.notes == {"who": "me"}


def test_resume_says_when_libraries_changed(tmp_path, caplog):
    make(tmp_path / "g", 3)
    path = tmp_path / "g/manifest.json"
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "0.4"
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        GradientStore.resume(tmp_path / "g", FakeEngine()).close()
    assert "'torch': '0.4'" in caplog.text


def test_a_store_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StoreError, match=r"(?s)no store at .*create\("):
        GradientStore.open(tmp_path / "none")
    with pytest.raises(StoreError, match=r"(?s)no store at .*create\("):
        GradientStore.resume(tmp_path / "none", FakeEngine())
    assert not (tmp_path / "none").exists()


def test_only_one_writer_at_a_time(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine()) as store:
        with pytest.raises(StoreError, match="another writer"):
            GradientStore.resume(tmp_path / "g", FakeEngine())
        with pytest.raises(StoreError, match="another writer"):
            GradientStore.create(tmp_path / "g", FakeEngine())
        GradientStore.open(tmp_path / "g")
        fill(store, 3)
    GradientStore.resume(tmp_path / "g", FakeEngine()).close()


def test_a_refused_resume_does_not_keep_the_lock(tmp_path):
    make(tmp_path / "g", 9)
    shard = shard_path(tmp_path / "g", 1)
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DamagedStoreError):
        GradientStore.resume(tmp_path / "g", FakeEngine())
    shard.write_bytes(kept)
    GradientStore.resume(tmp_path / "g", FakeEngine()).close()


@pytest.mark.parametrize("closed", [True, False])
def test_a_store_that_is_not_open_for_writing_refuses_rows(tmp_path, closed):
    store = make(tmp_path / "g", 3)
    store = store if closed else GradientStore.open(tmp_path / "g")
    with pytest.raises(StoreError, match="not open for writing"):
        store.append(batch(3, 4))
    with pytest.raises(StoreError, match="not open for writing"):
        store.commit()
    store.close()
    assert_holds(store, 3)


def test_rows_appended_before_an_exception_are_kept(tmp_path):
    def interrupted() -> None:
        with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
            fill(store, 6)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_holds(GradientStore.open(tmp_path / "g"), 6)


# What it refuses


@pytest.mark.parametrize(
    ("rows", "loss", "message"),
    [
        (StoredRows(torch.arange(3), torch.zeros(3, 5), None), None, r"must be \[3, 6\]"),
        (StoredRows(torch.arange(2), torch.zeros(3, 6), None), None, r"must be \[2, 6\]"),
        (StoredRows(torch.arange(3), torch.zeros(18), None), None, r"must be \[3, 6\]"),
        (StoredRows(torch.arange(3), torch.zeros(3, 6).half(), None), None, "nothing is cast"),
        (StoredRows(torch.arange(3), torch.zeros(3, 6).double(), None), None, "nothing is cast"),
        (StoredRows(torch.arange(3).int(), torch.zeros(3, 6), None), None, "ids must be int64"),
        (StoredRows(torch.zeros(3, 1).long(), torch.zeros(3, 6), None), None, "ids must be int64"),
        (batch(0, 3), torch.zeros(2), r"loss must be \[3\]"),
        (batch(0, 3), torch.zeros(3, 1), r"loss must be \[3\]"),
        (batch(0, 3), torch.arange(3), r"loss must be \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, rows, loss, message):
    with GradientStore.create(tmp_path / "g", FakeEngine()) as store:
        with pytest.raises(StoreError, match=message):
            store.append(rows, loss=loss)
        fill(store, 4)
    assert_holds(store, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_refused_by_id(tmp_path, dtype, value):
    rows = batch(0, 5, dtype)
    rows.rows[1, 2] = rows.rows[4, 0] = value
    with GradientStore.create(tmp_path / "g", FakeEngine(dtype)) as store:
        with pytest.raises(StoreError, match="samples 4, 13 are not finite"):
            store.append(rows)
        assert len(store) == 0


def test_losses_come_with_all_batches_or_none(tmp_path):
    with GradientStore.create(tmp_path / "a", FakeEngine()) as store:
        fill(store, 2)
        with pytest.raises(StoreError, match="no loss, these losses of dtype"):
            store.append(batch(2, 3), loss=torch.zeros(1))
    make(tmp_path / "b", 2, with_loss=True)
    with GradientStore.resume(tmp_path / "b", FakeEngine()) as store:
        for loss in (None, torch.zeros(1).double()):
            with pytest.raises(StoreError, match=r"losses of dtype torch\.float32"):
                store.append(batch(2, 3), loss=loss)


def test_errors_are_ghost_errors():
    assert issubclass(StoreError, GhostError)
    assert issubclass(DamagedStoreError, StoreError)


def test_resume_names_a_file_whose_content_changed(tmp_path):
    make(tmp_path / "g", 3, data=[DataFile("/a", "1"), DataFile("/b", "2")])
    data = [DataFile("/moved", "1"), DataFile("/b", "3")]
    with pytest.raises(StoreError, match=r"data\[1\]: /b has other content") as caught:
        GradientStore.resume(tmp_path / "g", FakeEngine(), data=data)
    assert "/moved" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.now) == (str(caught.value), caught.value.now)
    with pytest.raises(StoreError, match="data: 2 entries in the store, 1 now"):
        GradientStore.resume(tmp_path / "g", FakeEngine(), data=data[:1])


# Stores that were made in vain


def test_a_store_that_was_made_and_has_no_row_is_withdrawn(tmp_path):
    store = GradientStore.create(tmp_path / "g", FakeEngine())
    store.withdraw()
    assert [each.name for each in (tmp_path / "g").iterdir()] == [".lock"]
    make(tmp_path / "g", 3)
    assert_holds(GradientStore.open(tmp_path / "g"), 3)


def test_other_stores_are_closed_and_kept(tmp_path):
    GradientStore.create(tmp_path / "empty", FakeEngine()).close()
    GradientStore.resume(tmp_path / "empty", FakeEngine()).withdraw()
    assert len(GradientStore.open(tmp_path / "empty")) == 0
    GradientStore.join(tmp_path / "joined", FakeEngine(), part="a").withdraw()
    assert len(GradientStore.open(tmp_path / "joined")) == 0
    store = GradientStore.create(tmp_path / "g", FakeEngine())
    store.append(batch(0, 2))
    store.withdraw()
    assert len(GradientStore.open(tmp_path / "g")) == 2


def test_who_waited_for_a_store_that_was_withdrawn_is_told(tmp_path, monkeypatch):
    """It read the manifest before, and had the lock after."""
    store, read = GradientStore.create(tmp_path / "g", FakeEngine()), Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda root: (read(root), store.withdraw())[0])
    with pytest.raises(StoreError, match="there is no store"):
        GradientStore.resume(tmp_path / "g", FakeEngine())
    monkeypatch.undo()
    make(tmp_path / "g", 3)
