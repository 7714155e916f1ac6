"""Disks that fail, and folders that go away."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from disk_kit import Failing, failing, short_of_room
from kill_kit import STEPS, TOTAL, UNIT, FakeEngine, append, assert_holds_exactly, leftovers

from ghost_engines.store import GradientStore, StoreError

# Failing disks


STRIDES = [7, pytest.param(1, marks=pytest.mark.stress)]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", STEPS)
def test_after_a_failed_write_the_writer_can_go_on(tmp_path, name, stride):
    for at in range(0, 200, stride):
        root = tmp_path / f"{name}{at}"
        store = GradientStore.create(root, FakeEngine(), unit=UNIT)
        with store, failing(name, at) as disk:
            failed = False
            for stop in (5, 14, 36, 38, TOTAL):
                try:
                    append(store, stop)
                    store.commit()
                except OSError:
                    failed = True
                    assert len(store) == stop
                    left = GradientStore.open(root)
                    assert len(left) >= store.committed
                    assert_holds_exactly(left, len(left))
                    disk.broken = False
                    with pytest.raises(StoreError, match="do not append them again"):
                        append(store, stop + 1)
                    store.commit()
                    assert store.committed == stop
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        assert leftovers(root) == []
        if not failed:
            break
    assert at > 0
    assert not failed


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", STEPS)
def test_after_a_disk_stays_full_the_store_can_be_read_and_resumed(tmp_path, name, stride):
    for at in range(0, 200, stride):
        root = tmp_path / f"{name}{at}"
        store = GradientStore.create(root, FakeEngine(), unit=UNIT)
        acknowledged, failure = 0, None
        with failing(name, at):
            try:
                with store:
                    for stop in (5, 14, 36, 38, TOTAL):
                        append(store, stop)
                        acknowledged = store.committed
                        store.commit()
                        acknowledged = store.committed
            except OSError as error:
                failure = error
        left = GradientStore.open(root)
        assert len(left) >= store.committed >= acknowledged
        assert_holds_exactly(left, len(left))
        with GradientStore.resume(root, FakeEngine()) as store:
            if len(store) < TOTAL:
                append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        assert leftovers(root) == []
        if failure is None:
            break
        assert failure.errno == errno.ENOSPC
        assert "then the last rows could not be written" in failure.__notes__[0]
    assert at > 0
    assert failure is None


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
def test_a_create_that_failed_can_be_repeated(tmp_path, name):
    for at in range(20):
        root = tmp_path / "new" / f"{name}{at}"
        try:
            with failing(name, at):
                GradientStore.create(root, FakeEngine(), unit=UNIT).close()
        except OSError:
            if not (root / "manifest.json").exists():
                with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
                    append(store, TOTAL)
            else:
                with GradientStore.resume(root, FakeEngine()) as store:
                    append(store, TOTAL)
            assert_holds_exactly(GradientStore.open(root), TOTAL)
        else:
            break
    assert at > 0


def test_a_file_that_may_not_grow_is_an_error_and_loses_nothing(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT) as store:
        append(store, 14)
        store.commit()
        with short_of_room(500), pytest.raises(OSError, match="File too large"):
            append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(tmp_path / "g"), 14)
        assert leftovers(tmp_path / "g") == []
    assert_holds_exactly(GradientStore.open(tmp_path / "g"), TOTAL)


def test_a_failed_commit_never_hides_the_first_exception(tmp_path, caplog):
    def interrupted(disk: Failing) -> None:
        with GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT) as store:
            append(store, 5)
            disk.at = 0
            raise ZeroDivisionError

    with failing("fsync", 1000) as disk, pytest.raises(ZeroDivisionError) as caught:
        interrupted(disk)
    assert "could not be written" in caught.value.__notes__[0]
    assert "No space left" in caught.value.__notes__[0]
    assert "could not be written" in caplog.text
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        assert_holds_exactly(store, 0)


def test_a_failed_commit_at_the_end_is_an_error(tmp_path):
    store = GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT)
    append(store, 5)
    with failing("fsync", 0), pytest.raises(OSError, match="No space left"):
        store.close()
    assert len(store) == 0
    GradientStore.resume(tmp_path / "g", FakeEngine()).close()


def test_a_read_only_file_system_refuses_writers_and_lets_readers_read(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT) as store:
        append(store, 14)
    with failing("open", 0, number=errno.EROFS):
        left = GradientStore.open(tmp_path / "g")
        assert_holds_exactly(left, 14)
        left.verify()
        with pytest.raises(OSError, match="Read-only file system"):
            GradientStore.resume(tmp_path / "g", FakeEngine())
        with pytest.raises(OSError, match="Read-only file system"):
            GradientStore.create(tmp_path / "h", FakeEngine())
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        append(store, TOTAL)
    assert_holds_exactly(GradientStore.open(tmp_path / "g"), TOTAL)


def test_a_folder_that_is_removed_is_not_made_anew(tmp_path):
    store = GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT)
    append(store, 5)
    (tmp_path / "g").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        store.commit()
    assert not (tmp_path / "g").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "g")
    store.close()
    assert_holds_exactly(GradientStore.open(tmp_path / "g"), 5)


def test_data_is_on_disk_before_its_name_and_the_name_before_the_acknowledgement(
    tmp_path, monkeypatch
):
    """A power failure cannot be tried; the order of the steps is what saves from it."""
    seen: list[tuple[str, str]] = []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        synced(descriptor)

    def replace(source: Path, target: Path) -> None:
        seen.append(("replace", str(target)))
        replaced(source, target)

    store = GradientStore.create(tmp_path / "a/g", FakeEngine(), unit=UNIT)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with store:
        append(store, 3)
    root = tmp_path / "a/g"
    shard = root / "shards/00000/g-00000000.safetensors"
    assert seen == [
        ("fsync", f"{shard}.ghost-tmp"),
        ("replace", str(shard)),
        ("fsync", str(shard.parent)),
        ("fsync", str(root / "shards")),
        ("fsync", str(root)),
        ("fsync", str(root / "committed.json.ghost-tmp")),
        ("replace", str(root / "committed.json")),
        ("fsync", str(root)),
    ]
    seen.clear()
    GradientStore.create(tmp_path / "b/c", FakeEngine()).close()
    assert ("fsync", str(tmp_path)) in seen
    assert seen.index(("fsync", str(tmp_path / "b"))) < seen.index(
        ("replace", str(tmp_path / "b/c/manifest.json"))
    )


def test_what_killed_writers_left_is_cleaned_up_and_never_read(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT) as store:
        append(store, 20)
    for leftover in ("manifest.json", "shards/00000/g-00000002.safetensors"):
        (tmp_path / "g" / f"{leftover}.ghost-tmp").write_bytes(b"half")
    assert_holds_exactly(GradientStore.open(tmp_path / "g"), 20)
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        assert leftovers(tmp_path / "g") == []
        assert_holds_exactly(store, 20)


def test_a_damaged_tail_is_not_written_anew_with_a_good_hash(tmp_path):
    with GradientStore.create(tmp_path, FakeEngine(), unit=UNIT) as store:
        append(store, 5)
    (shard,) = tmp_path.rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="altered"):
        GradientStore.resume(tmp_path, FakeEngine())


def test_a_writer_does_not_write_into_a_store_that_replaced_its_own(tmp_path):
    root = tmp_path / "store"
    first = GradientStore.create(root, FakeEngine(), unit=UNIT)
    append(first, 5)
    shutil.rmtree(root)
    with GradientStore.create(root, FakeEngine(), unit=UNIT) as second:
        append(second, 7)
        second.commit()
        with pytest.raises(StoreError, match="replaced by another"):
            first.commit()
        with pytest.raises(StoreError, match="replaced by another"):
            first.close()
    with GradientStore.open(root) as store:
        assert_holds_exactly(store, 7)
