"""Open readers of a store in whose place another one is put."""

import pickle
import shutil

import pytest
import torch
from store_kit import FakeEngine, assert_holds, batch, fill, make

from ghost_engines.store import DamagedStoreError, GradientStore, StoredRows, StoreError
from ghost_engines.store.listing import shard_path


def other_rows(root):
    """Make a store of the same engine, as long as the first one, with other rows."""
    with GradientStore.create(root, FakeEngine(), unit=4) as store:
        store.append(StoredRows(torch.arange(11), batch(50, 61).rows, None))


def reads(store):
    return [
        lambda: store.rows(0, 2),
        lambda: store.ids,
        lambda: list(store.blocks()),
        lambda: store.search(torch.ones(1, 6), k=1),
        lambda: store.verify(),
    ]


@pytest.mark.parametrize("how", ["removed", "emptied", "moved"])
def test_rows_of_a_store_that_replaced_the_one_that_was_opened_are_refused(tmp_path, how):
    root = tmp_path / "g"
    make(root, 11)
    reader = GradientStore.open(root)
    reader.rows(0, 2)
    if how == "removed":
        shutil.rmtree(root)
    elif how == "emptied":
        shutil.rmtree(root / "shards")
        for path in root.iterdir():
            path.unlink()
    else:
        root.rename(tmp_path / "aside")
    other_rows(root)
    for read in reads(reader):
        with pytest.raises(StoreError, match="was replaced by another"):
            read()
    assert GradientStore.open(root).rows(0, 1).tolist() == batch(50, 51).rows.tolist()


def test_a_store_that_is_gone_is_missing_and_one_that_is_back_can_be_read(tmp_path):
    make(tmp_path / "g", 11)
    reader = GradientStore.open(tmp_path / "g")
    (tmp_path / "g").rename(tmp_path / "aside")
    for read in reads(reader):
        with pytest.raises(DamagedStoreError, match="is missing"):
            read()
    (tmp_path / "aside").rename(tmp_path / "g")
    assert_holds(reader, 11)


def test_a_reader_can_be_sent_to_another_process(tmp_path):
    make(tmp_path / "g", 11)
    assert_holds(pickle.loads(pickle.dumps(GradientStore.open(tmp_path / "g"))), 11)


def test_an_older_version_of_a_shard_under_an_open_reader_is_named(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 1)
        store.commit()
        older = shard_path(tmp_path / "g", 0).read_bytes()
        fill(store, 3)
    reader = GradientStore.open(tmp_path / "g")
    shard_path(tmp_path / "g", 0).write_bytes(older)
    for read in reads(reader):
        with pytest.raises(DamagedStoreError, match="holds 1 rows, it had 3"):
            read()
