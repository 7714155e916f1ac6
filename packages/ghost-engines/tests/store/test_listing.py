"""Folders that cannot be listed, or hold something else than a store put there."""

import os
import shutil

import pytest
import torch
from store_kit import FakeEngine, assert_holds, batch, fill, make

from ghost_engines.store import DamagedStoreError, GradientStore, StoreError
from ghost_engines.store.listing import shard_path


def contents(root) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def readers():
    return [GradientStore.open, lambda path: GradientStore.resume(path, FakeEngine())]


@pytest.mark.parametrize("hidden", ["shards", "shards/00000"])
def test_shards_that_cannot_be_listed_are_an_error_and_are_not_overwritten(
    tmp_path, monkeypatch, hidden
):
    root = tmp_path / "g"
    make(root, 10)
    before, scandir = contents(root), os.scandir

    def refusing(path):
        if str(path) == str(root / hidden):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        for act in readers():
            with pytest.raises(PermissionError, match=hidden):
                act(root)
        (root / "manifest.json").rename(tmp_path / "manifest.json")
        with pytest.raises(PermissionError, match=hidden):
            GradientStore.create(root, FakeEngine())
    (tmp_path / "manifest.json").rename(root / "manifest.json")
    assert contents(root) == before


@pytest.mark.parametrize("n", [3, 4])
def test_a_shard_that_a_writer_does_not_know_of_is_not_overwritten(tmp_path, n):
    make(tmp_path / "other", n)
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        path = shard_path(tmp_path / "g", 0)
        path.parent.mkdir(parents=True)
        shutil.copy(shard_path(tmp_path / "other", 0), path)
        before = path.read_bytes()
        rows = batch(100, 104)
        with pytest.raises(StoreError, match="is not overwritten") as caught:
            store.append(rows)
        assert caught.value.remedy
        assert path.read_bytes() == before
        path.unlink()
        store.commit()
    assert torch.equal(GradientStore.open(tmp_path / "g").rows(), rows.rows)


@pytest.mark.parametrize("name", ["shards", "shards/00000"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, name):
    make(tmp_path / "g", 10)
    shutil.rmtree(tmp_path / "g" / name)
    (tmp_path / "g" / name).write_text("")
    for act in readers():
        with pytest.raises(DamagedStoreError, match=f"{name} is not a folder"):
            act(tmp_path / "g")


@pytest.mark.parametrize("missing", ["shards", "shards/00000", 2, 1])
def test_a_store_whose_last_shards_are_missing_does_not_open_short(tmp_path, missing):
    make(tmp_path / "g", 10)
    if isinstance(missing, str):
        shutil.rmtree(tmp_path / "g" / missing)
    else:
        for unit in range(missing, 3):
            shard_path(tmp_path / "g", unit).unlink()
    for act in readers():
        with pytest.raises(DamagedStoreError, match="but 10 were committed") as caught:
            act(tmp_path / "g")
        assert "committed.json" in caught.value.remedy


def test_an_older_version_of_the_last_shard_is_not_taken_for_the_last_one(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 1)
        store.commit()
        older = shard_path(tmp_path / "g", 0).read_bytes()
        fill(store, 3)
    shard_path(tmp_path / "g", 0).write_bytes(older)
    with pytest.raises(DamagedStoreError, match="holds 1 rows, but 3 were committed"):
        GradientStore.open(tmp_path / "g")


@pytest.mark.parametrize("record", [b"", b"[]", b'{"rows": 3}', b'{"fingerprint":"a","rows":3}'])
def test_a_record_that_was_altered_is_named(tmp_path, record):
    make(tmp_path / "g", 10)
    (tmp_path / "g/committed.json").write_bytes(record)
    with pytest.raises(DamagedStoreError, match=r"committed\.json"):
        GradientStore.open(tmp_path / "g")


def test_a_store_without_a_record_is_read_and_gets_one(tmp_path):
    """As one is that an earlier version made."""
    make(tmp_path / "g", 10)
    (tmp_path / "g/committed.json").unlink()
    assert_holds(GradientStore.open(tmp_path / "g"), 10)
    GradientStore.resume(tmp_path / "g", FakeEngine()).close()
    assert (tmp_path / "g/committed.json").exists()


@pytest.mark.parametrize("unit", [5, 99_999, 10**9, 10**60])
def test_a_shard_with_a_huge_number_is_named_at_once(tmp_path, unit):
    make(tmp_path / "g", 10)
    stray = shard_path(tmp_path / "g", unit)
    stray.parent.mkdir(exist_ok=True)
    shutil.copy(shard_path(tmp_path / "g", 0), stray)
    with pytest.raises(DamagedStoreError, match="missing") as caught:
        GradientStore.open(tmp_path / "g")
    assert str(stray) in str(caught.value)
    assert len(str(caught.value).splitlines()) < 30


@pytest.mark.parametrize(
    "name",
    [".lock", "manifest.json", "committed.json", "shards/00000/g-00000001.safetensors"],
)
def test_a_pipe_in_the_place_of_a_file_is_an_error_and_nobody_waits(tmp_path, name):
    path = tmp_path / "g" / name
    make(tmp_path / "g", 10)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="not a file") as caught:
        GradientStore.resume(tmp_path / "g", FakeEngine())
    assert str(path) in str(caught.value)


def test_nobody_writes_through_a_link_or_into_a_pipe(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for at, put in enumerate([os.mkfifo, lambda path: os.symlink(mine, path)]):
        with GradientStore.create(tmp_path / f"{at}", FakeEngine(), unit=4) as store:
            shard = shard_path(store.path, 0)
            shard.parent.mkdir(parents=True)
            put(f"{shard}.ghost-tmp")
            with pytest.raises(OSError, match="ghost-tmp"):
                fill(store, 4)
            store.commit()  # it was removed as what a failed write had left
        assert_holds(GradientStore.open(store.path), 4)
    assert mine.read_text() == "mine"


def test_a_path_may_have_any_bytes(tmp_path):
    root = os.path.join(os.fsencode(tmp_path), b"\xff\xfe")
    make(os.fsdecode(root), 10)
    store = GradientStore.open(os.fsdecode(root))
    assert_holds(store, 10)
    store.verify()


def test_files_of_others_beside_the_shards_do_not_matter(tmp_path):
    make(tmp_path / "g", 10)
    (tmp_path / "g/shards/README").write_text("mine")
    (tmp_path / "g/shards/00000/notes.txt").write_text("mine")
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        assert_holds(store, 10)
    assert (tmp_path / "g/shards/README").exists()


def test_a_file_system_without_locks_is_told_by_its_path(tmp_path, monkeypatch):
    make(tmp_path / "g", 3)

    def unsupported(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(OSError, match=r"not supported: '.*\.lock'"):
        GradientStore.resume(tmp_path / "g", FakeEngine())
