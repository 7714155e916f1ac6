"""Several writers of one store, each of a part of its own."""

import json
import shutil

import pytest
import torch
from store_kit import FakeEngine, assert_holds, batch, files, fill, make

from ghost_engines.store import DamagedStoreError, GradientStore, StoreError
from ghost_engines.store.parts import part_name


def join(root, part, **given):
    return GradientStore.join(root, FakeEngine(), part=part, **{"unit": 4, **given})


def dealt(rank, world, n, unit=4):
    """Yield the rows of every world-th unit of data, as a writer has them."""
    for first in range(rank * unit, n, world * unit):
        yield first, min(first + unit, n)


def write_dealt(root, world, n):
    """Write with several writers that are open at the same time."""
    writers = [join(root, (rank, world)) for rank in range(world)]
    for rank, store in enumerate(writers):
        for start, stop in dealt(rank, world, n):
            store.append(batch(start, stop))
    for store in writers:
        store.close()


@pytest.mark.parametrize(("world", "n"), [(1, 9), (2, 23), (3, 24), (4, 9)])
def test_units_that_are_dealt_in_turn_are_read_in_order(tmp_path, world, n):
    write_dealt(tmp_path / "g", world, n)
    read = GradientStore.open(tmp_path / "g")
    assert_holds(read, n)
    assert read.committed == n
    for start in range(0, n + 1, 3):
        for stop in range(start, n + 1, 5):
            assert torch.equal(read.rows(start, stop), batch(start, stop).rows)
    ids = batch(0, n).ids.flip(0)
    assert torch.equal(read.rows_by_id(ids), batch(0, n).rows.flip(0))
    assert torch.equal(torch.cat([b.ids for b in read.blocks(3)]), batch(0, n).ids)
    alone = make(tmp_path / "alone", n)
    queries = torch.randn(3, 6)
    found, expected = read.search(queries, 5, block=3), alone.search(queries, 5, block=3)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.ordinals, expected.ordinals)
    read.verify()
    assert read.size_on_disk > 0


def test_parts_of_any_names_and_lengths_are_all_read(tmp_path):
    with join(tmp_path / "g", "b") as one, join(tmp_path / "g", "a.1") as other:
        one.append(batch(0, 9))
        other.append(batch(9, 11))
        assert_holds(one, 9)  # a writer has its own rows
        assert GradientStore.open(tmp_path / "g").ids.tolist() == batch(0, 8).ids.tolist()
    read = GradientStore.open(tmp_path / "g")
    assert sorted(read.ids.tolist()) == batch(0, 11).ids.tolist()
    assert torch.equal(read.rows_by_id(batch(0, 11).ids), batch(0, 11).rows)


def test_files_do_not_depend_on_who_came_first_or_went_on(tmp_path):
    write_dealt(tmp_path / "a", 2, 23)
    for rank in (1, 0, 1, 0):  # each stops in the middle of a unit, and goes on
        with join(tmp_path / "b", (rank, 2)) as store:
            done, half = len(store), not len(store)
            mine = torch.cat([torch.arange(*bounds) for bounds in dealt(rank, 2, 23)])
            for at in mine[done : 6 if half else None].tolist():
                store.append(batch(at, at + 1))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_part_has_one_writer_at_a_time(tmp_path):
    with join(tmp_path / "g", (0, 2)) as store:
        with pytest.raises(StoreError, match=r"another writer has .*00000-of-00002"):
            join(tmp_path / "g", (0, 2))
        join(tmp_path / "g", (1, 2)).close()
        assert "00000-of-00002" in repr(store)
    join(tmp_path / "g", (0, 2)).close()


def test_writers_of_other_rows_cannot_join(tmp_path):
    join(tmp_path / "g", "a").close()
    for given, told in [({"unit": 5}, "unit"), ({"info": {"x": 1}}, "info")]:
        with pytest.raises(StoreError, match=told):
            join(tmp_path / "g", "b", **given)
    with pytest.raises(StoreError, match="seed"):
        GradientStore.join(tmp_path / "g", FakeEngine(seed=1), part="b", unit=4)
    assert files(tmp_path / "g" / "parts") == {"a/.lock"}


def test_a_store_has_one_writer_or_parts(tmp_path):
    make(tmp_path / "one", 5)
    with pytest.raises(StoreError, match="has no parts"):
        join(tmp_path / "one", "a")
    with (
        GradientStore.create(tmp_path / "open", FakeEngine(), unit=4),
        pytest.raises(StoreError, match="another writer has"),
    ):
        join(tmp_path / "open", "a")
    join(tmp_path / "g", "a").close()
    with pytest.raises(StoreError, match=r"join\(path"):
        GradientStore.resume(tmp_path / "g", FakeEngine())
    with pytest.raises(StoreError, match="there is a store"):
        GradientStore.create(tmp_path / "g", FakeEngine())


@pytest.mark.parametrize("part", ["", "a/b", "..", "é", "a b", "x" * 101, (2, 2), (-1, 2), 3, ()])
def test_what_cannot_be_a_part_is_refused_before_there_is_a_store(tmp_path, part):
    with pytest.raises(StoreError, match="cannot be a part"):
        join(tmp_path / "g", part)
    assert not (tmp_path / "g").exists()


def test_writers_that_are_numbered_sort_by_number():
    names = [part_name((rank, 128)) for rank in (2, 100, 11)]
    assert sorted(names) == [part_name((rank, 128)) for rank in (2, 11, 100)]


def gone(root):
    shutil.rmtree(root / "parts/00001-of-00002")


def gone_and_joined(root):
    gone(root)
    return lambda root: join(root, (1, 2))


def last_shard_gone(root):
    sorted((root / "parts/00001-of-00002").rglob("g-*"))[-1].unlink()


def swapped(root):
    one, other = (root / f"parts/0000{rank}-of-00002/shards" for rank in (0, 1))
    one.rename(root / "aside")
    other.rename(one)
    (root / "aside").rename(other)


def brought_in(root):
    shutil.copytree(root / "parts/00001-of-00002", root / "parts/x")


def register_gone(root):
    (root / "parts.json").unlink()


def manifest_gone_and_joined(root):
    (root / "manifest.json").unlink()
    return lambda root: join(root, (0, 2))


def register_altered(root):
    content = json.loads((root / "parts.json").read_text())
    (root / "parts.json").write_text(json.dumps({**content, "parts": [3]}))


def register_of_another(root):
    join(root / "other", (0, 1), info={"x": 1}).close()
    (root / "other/parts.json").rename(root / "parts.json")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (gone, "00001-of-00002 is missing"),
        (gone_and_joined, "00001-of-00002 is missing"),
        (last_shard_gone, "11 were committed"),
        (swapped, "another part of the store"),
        (brought_in, "does not name it"),
        (register_gone, "does not name it"),
        (register_altered, "parts"),
        (register_of_another, "belongs to another store"),
        (manifest_gone_and_joined, r"manifest\.json is missing"),
    ],
)
def test_parts_that_are_lost_or_moved_are_missed(tmp_path, damage, told):
    write_dealt(tmp_path / "g", 2, 23)
    act = damage(tmp_path / "g") or GradientStore.open
    with pytest.raises(DamagedStoreError, match=told):
        act(tmp_path / "g")


def test_parts_with_and_without_losses_are_refused_when_they_are_read_together(tmp_path):
    with join(tmp_path / "g", "a") as one, join(tmp_path / "g", "b") as other:
        fill(one, 3, with_loss=True)
        fill(other, 3)
    with pytest.raises(DamagedStoreError, match="same kind of loss"):
        GradientStore.open(tmp_path / "g")


def test_samples_that_two_writers_stored_are_told_when_the_store_is_verified(tmp_path):
    with join(tmp_path / "g", "a") as one, join(tmp_path / "g", "b") as other:
        one.append(batch(0, 5))
        other.append(batch(3, 9))
    store = GradientStore.open(tmp_path / "g")
    with pytest.raises(DamagedStoreError, match="samples 10, 13 in more than one"):
        store.verify()
    with pytest.raises(StoreError, match="several rows of sample 10 are stored"):
        store.rows_by_id([10])
