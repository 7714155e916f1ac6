"""What a store holds, and reading it."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from store_kit import DTYPES, FakeEngine, assert_holds, batch, files, fill, make

from ghost_engines import ProjectionEngine
from ghost_engines.store import GradientStore, StoredRows, StoreError
from ghost_engines.store.listing import shard_path
from ghost_engines.store.tensor_header import header_length

# What it holds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 3, 4, 11, 100])
def test_rows_come_back_in_order_whatever_the_batches(tmp_path, dtype, step):
    with GradientStore.create(tmp_path / "g", FakeEngine(dtype), unit=4) as store:
        fill(store, 14, step)
        assert_holds(store, 14)
    assert_holds(store, 14)
    assert store.committed == 14
    read = GradientStore.open(tmp_path / "g")
    assert_holds(read, 14)
    assert read.losses is None
    read.verify()


def test_units_are_files_named_by_their_number_alone(tmp_path):
    make(tmp_path / "g", 10)
    names = {f"shards/00000/g-0000000{unit}.safetensors" for unit in range(3)}
    assert files(tmp_path / "g") == names | {"manifest.json", "committed.json", ".lock"}
    assert shard_path(tmp_path, 12345) == tmp_path / "shards/00012/g-00012345.safetensors"


def test_a_shard_tells_what_it_is_without_ghost(tmp_path):
    store = make(tmp_path / "g", 10, with_loss=True)
    path = shard_path(tmp_path / "g", 1)
    tensors = load_file(path)
    assert torch.equal(tensors["g"], batch(4, 8).rows)
    assert torch.equal(tensors["ids"], batch(4, 8).ids)
    assert torch.equal(tensors["loss"], batch(4, 8).ids / 7)
    digest = xxhash.xxh3_128()
    for name in ("g", "ids", "loss"):
        digest.update(tensors[name].numpy().tobytes())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "fingerprint": store.manifest.fingerprint,
            "unit": "1",
            "xxh3_128.ids": xxhash.xxh3_128_hexdigest(tensors["ids"].numpy().tobytes()),
            "xxh3_128.loss": xxhash.xxh3_128_hexdigest(tensors["loss"].numpy().tobytes()),
            "xxh3_128": digest.hexdigest(),
        }


def test_the_manifest_is_readable_and_its_fingerprint_can_be_recomputed(tmp_path):
    make(tmp_path / "g", 3, info={"model": "abc", "loss": "nll"}, notes={"who": "me"})
    content = json.loads((tmp_path / "g/manifest.json").read_text())
    assert content["schema"] == 2
    assert content["engine"]["layers"][1]["shape"] == [4, 3]
    assert content["info"] == {"model": "abc", "loss": "nll"}
    assert content["versions"]["torch"]
    fingerprint = content.pop("fingerprint")
    identity = {key: content[key] for key in content if key not in ("notes", "versions")}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == fingerprint


def test_the_fingerprint_covers_what_changes_a_value_and_nothing_else(tmp_path):
    engines = [
        FakeEngine(),
        FakeEngine(seed=43),
        FakeEngine(torch.float16),
        FakeEngine(k_total=7),
        FakeEngine(layers=FakeEngine().layers[:1]),
        FakeEngine(layers=FakeEngine().layers[::-1]),
    ]
    given = [{"engine": engine} for engine in engines]
    given += [{"engine": FakeEngine(), "unit": 5}, {"engine": FakeEngine(), "info": {"model": "a"}}]
    same = [{"engine": FakeEngine(), "notes": {"who": "me"}}, {"engine": FakeEngine(), "info": {}}]
    seen = []
    for at, arguments in enumerate(given + same):
        with GradientStore.create(tmp_path / str(at), **arguments) as store:
            seen.append(store.manifest.fingerprint)
    assert len(set(seen[: len(given)])) == len(given)
    assert seen[len(given) :] == [seen[0]] * len(same)


def test_rows_count_as_committed_only_once_they_are_on_disk(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        for n, committed in [(3, 0), (4, 4), (6, 4), (13, 12)]:
            store.append(batch(len(store), n))
            assert (len(store), store.committed) == (n, committed)
            assert len(GradientStore.open(tmp_path / "g")) == committed
            assert_holds(store, n)
        store.commit()
        assert store.committed == 13
        assert_holds(GradientStore.open(tmp_path / "g"), 13)


def test_committing_again_writes_nothing(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 6)
        store.commit()
        before = shard_path(store.path, 1).stat().st_mtime_ns
        store.commit()
    assert shard_path(store.path, 1).stat().st_mtime_ns == before


def test_a_store_may_be_empty_and_so_may_a_batch(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine()) as store:
        store.append(batch(0, 0))
        assert_holds(store, 0)
    store = GradientStore.open(tmp_path / "g")
    assert_holds(store, 0)
    assert list(store.blocks()) == []
    store.verify()
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        fill(store, 3, with_loss=True)
    assert_holds(store, 3)


def test_losses_are_kept_in_their_own_dtype(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(torch.float16), unit=4) as store:
        for start in (0, 5):
            rows = batch(start, start + 5, torch.float16)
            store.append(rows, loss=rows.ids.double() / 3)
    with GradientStore.resume(tmp_path / "g", FakeEngine(torch.float16)) as store:
        rows = batch(10, 11, torch.float16)
        store.append(rows, loss=rows.ids.double() / 3)
    losses = GradientStore.open(tmp_path / "g").losses
    assert losses.dtype == torch.float64
    assert torch.equal(losses, batch(0, 11).ids.double() / 3)


def test_rows_are_copied_on_the_way_in(tmp_path):
    rows = batch(0, 3)
    rows.rows.requires_grad_()
    with GradientStore.create(tmp_path / "g", FakeEngine()) as store:
        store.append(rows)
        with torch.no_grad():
            rows.rows.zero_()
        rows.ids.zero_()
    assert_holds(store, 3)


def test_strided_rows_are_stored_as_they_read(tmp_path):
    rows = batch(0, 6)
    with GradientStore.create(tmp_path / "g", FakeEngine()) as store:
        store.append(StoredRows(rows.ids, rows.rows.T.contiguous().T, None))
    assert_holds(GradientStore.open(tmp_path / "g"), 6)


def test_a_store_takes_the_rows_of_the_projection_engine(tmp_path, mlp):
    engine = ProjectionEngine(mlp, dim=4, min_dim=1, seed=1)
    kept = []
    with GradientStore.create(tmp_path / "g", engine, unit=4) as store, engine.frozen():
        for ids in ([7, 3, 5], [11, 2, 9]):
            with engine.batch(ids):
                mlp(torch.randn(3, 5, dtype=torch.float64)).pow(2).sum().backward()
            kept.append(engine.collect())
            store.append(engine.collect())
    read = GradientStore.open(tmp_path / "g")
    assert read.ids.tolist() == [7, 3, 5, 11, 2, 9]
    assert torch.equal(read.rows(), torch.cat([each.rows for each in kept]))
    GradientStore.resume(tmp_path / "g", engine).close()


# Reading


@pytest.mark.parametrize("open_it", [True, False])
def test_any_range_can_be_read(tmp_path, open_it):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 11)
        if open_it:
            store.commit()
        read = GradientStore.open(tmp_path / "g") if open_it else store
        for start in range(12):
            for stop in range(start, 12):
                assert torch.equal(read.rows(start, stop), batch(start, stop).rows)


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 12), (12, 12)])
def test_rows_that_are_not_there_are_an_error(tmp_path, bounds):
    store = make(tmp_path / "g", 11)
    with pytest.raises(StoreError, match="the store has 11"):
        store.rows(*bounds)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_blocks_cover_all_rows_in_order(tmp_path, size):
    make(tmp_path / "g", 11, with_loss=True)
    blocks = list(GradientStore.open(tmp_path / "g").blocks(size))
    assert all(0 < len(block) <= size for block in blocks)
    assert torch.equal(torch.cat([block.ids for block in blocks]), batch(0, 11).ids)
    assert torch.equal(torch.cat([block.rows for block in blocks]), batch(0, 11).rows)
    assert torch.equal(torch.cat([block.loss for block in blocks]), batch(0, 11).ids / 7)


def test_a_block_of_no_rows_is_refused(tmp_path):
    with pytest.raises(StoreError, match="at least 1"):
        list(make(tmp_path / "g", 3).blocks(0))


def test_writing_to_what_was_read_changes_no_file(tmp_path):
    store = make(tmp_path / "g", 8)
    store.rows(0, 4).zero_()
    next(iter(store.blocks())).rows.zero_()
    assert_holds(store, 8)
    store.verify()


@pytest.mark.skipif(sys.platform != "linux", reason="others do not list what is mapped")
def test_rows_of_one_shard_are_mapped_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("ghost_engines.store.tensor_files._WORTH_MAPPING", 0)
    store = make(tmp_path / "g", 8)
    rows = store.rows(5, 7)
    assert rows.numpy().ctypes.data == rows.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    own = [
        each[-1]
        for each in maps
        if (ends := [int(end, 16) for end in each[0].split("-")])[0] <= rows.data_ptr() < ends[1]
    ]
    assert own == [str(shard_path(tmp_path / "g", 1))]


def test_a_reader_sees_the_store_as_it_was_opened(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 6)
        store.commit()
        reader = GradientStore.open(tmp_path / "g")
        fill(store, 23)
        store.commit()
        assert_holds(reader, 6)
        reader.verify()


def test_a_shard_that_is_replaced_while_it_is_opened_is_read_as_it_was(tmp_path, monkeypatch):
    store = GradientStore.create(tmp_path / "g", FakeEngine(), unit=4)
    fill(store, 2)
    store.commit()
    reader = GradientStore.open(tmp_path / "g")
    opened = []

    def replaced_once(head, size):
        if not opened:
            opened.append(size)
            fill(store, 3)
            store.commit()
        return header_length(head, size)

    monkeypatch.setattr("ghost_engines.store.tensor_files.header_length", replaced_once)
    assert torch.equal(reader.rows(), batch(0, 2).rows)
    assert opened
    store.close()


def test_a_writer_can_read_while_it_writes_on(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 6)
        blocks = store.blocks(2)
        seen = [next(blocks)]
        fill(store, 23)
        seen += list(blocks)
    assert torch.equal(torch.cat([block.rows for block in seen]), batch(0, 6).rows)
