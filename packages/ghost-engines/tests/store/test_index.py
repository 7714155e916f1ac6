"""The index beside the shards: as good as the shards, or made anew."""

import os
import shutil

import pytest
import torch
from store_kit import FakeEngine, batch, fill, make

from ghost_engines.store import DamagedStoreError, GradientStore, StoredRows, StoreError
from ghost_engines.store.index import INDEX
from ghost_engines.store.tensor_files import TensorFile, write_tensors


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """Keep an index of stores with few shards too."""
    monkeypatch.setattr("ghost_engines.store.pieces.WORTH_KEEPING", 3)


@pytest.fixture
def all_ids_are_read(monkeypatch):
    """Count how often all ids of a store are read."""
    times, real = [], GradientStore._ids
    monkeypatch.setattr(GradientStore, "_ids", lambda self: times.append(self) or real(self))
    return times


def assert_found(root, n):
    store = GradientStore.open(root)
    ids = batch(0, n).ids
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    assert torch.equal(store.ordinals(ids[order]), order)
    assert torch.equal(store.rows_by_id(ids[order]), batch(0, n).rows[order])
    with pytest.raises(StoreError, match="no row of sample 0 is stored"):
        store.rows_by_id([0])


def test_it_is_made_once_and_then_read(tmp_path, all_ids_are_read):
    make(tmp_path / "g", 11)
    all_ids_are_read.clear()
    assert_found(tmp_path / "g", 11)
    assert len(all_ids_are_read) == 1
    assert_found(tmp_path / "g", 11)
    assert len(all_ids_are_read) == 1
    assert GradientStore.open(tmp_path / "g").verify() is None


def test_stores_of_few_shards_have_none(tmp_path):
    make(tmp_path / "g", 8)
    assert_found(tmp_path / "g", 8)
    assert not (tmp_path / "g" / INDEX).exists()


def test_it_is_made_anew_once_there_are_more_rows(tmp_path):
    make(tmp_path / "g", 9)
    assert_found(tmp_path / "g", 9)
    before = GradientStore.open(tmp_path / "g")
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        for stop in (10, 14):  # in the last shard, and in others
            fill(store, stop)
            store.commit()
            assert_found(tmp_path / "g", stop)
            assert torch.equal(store.ordinals(batch(0, stop).ids), torch.arange(stop))
    assert torch.equal(store.ordinals(batch(0, 14).ids), torch.arange(14))
    with pytest.raises(StoreError, match=r"no row of sample .* is stored"):
        before.ordinals(batch(9, 10).ids)  # it is as it was when it was opened


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "folder", "other", "tensors"])
def test_it_is_made_anew_where_it_is_damaged_or_of_another_store(tmp_path, kind):
    make(tmp_path / "g", 11)
    assert_found(tmp_path / "g", 11)
    path = tmp_path / "g" / INDEX
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[-1] ^= 1
    path.write_bytes(data[: {"cut": -8, "empty": 0}.get(kind, len(data))])
    if kind == "folder":
        path.unlink()
        path.mkdir()
    if kind == "other":
        make(tmp_path / "h", 11, info={"x": 1})
        assert_found(tmp_path / "h", 11)
        shutil.copy(tmp_path / "h" / INDEX, path)
    if kind == "tensors":
        with TensorFile(path) as file:
            of = file.metadata["shards"]
        write_tensors(path, {"ids": torch.arange(11)}, {"shards": of}, path.parent, "xxh3_128")
    assert_found(tmp_path / "g", 11)
    assert path.is_file() == (kind != "folder")
    if path.is_file():
        with TensorFile(path) as file:
            assert file.kind == "xxh3_128"


def test_it_never_counts_against_the_shards(tmp_path):
    make(tmp_path / "g", 11)
    assert_found(tmp_path / "g", 11)
    path = tmp_path / "g" / INDEX
    with TensorFile(path) as file:
        tensors = {name: file.read_tensor(name) for name in file.places}
        metadata = {"shards": file.metadata["shards"]}
    tensors["ordinals"] = tensors["ordinals"].flip(0)
    write_tensors(path, tensors, metadata, path.parent, "xxh3_128")
    with pytest.raises(DamagedStoreError, match="does not fit the shards: remove it"):
        GradientStore.open(tmp_path / "g").rows_by_id([1])


def test_a_folder_that_cannot_be_written_is_read_without(tmp_path, monkeypatch, all_ids_are_read):
    make(tmp_path / "g", 11)
    all_ids_are_read.clear()

    def refused(*arguments, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    assert_found(tmp_path / "g", 11)
    assert_found(tmp_path / "g", 11)
    assert len(all_ids_are_read) == 2
    assert not (tmp_path / "g" / INDEX).exists()


def test_samples_of_parts_and_replaced_rows_are_found(tmp_path):
    for part, start in (("a", 0), ("b", 8)):
        with GradientStore.join(
            tmp_path / "g", FakeEngine(), part=part, unit=4, duplicates="replace"
        ) as store:
            store.append(batch(start, start + 8))
            rows = batch(start, start + 2)
            store.append(StoredRows(rows.ids, rows.rows + 1))
    for _ in range(2):
        store = GradientStore.open(tmp_path / "g")
        expected = batch(0, 16).rows
        expected[[0, 1, 8, 9]] += 1
        assert torch.equal(store.rows_by_id(batch(0, 16).ids), expected)
        assert torch.equal(store.ids[store.ordinals(batch(0, 16).ids)], batch(0, 16).ids)
    assert (tmp_path / "g" / INDEX).exists()
