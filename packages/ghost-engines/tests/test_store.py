"""What a store holds, what it refuses, and what it makes of files that were tampered with."""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ghost_core import GhostError
from ghost_engines import ProjectionEngine
from ghost_engines.store import DamagedStoreError, GradientStore, StoredRows, StoreError
from ghost_engines.store.shards import shard_path

K = 6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass
class FakeEngine:
    dtype: torch.dtype = torch.float32
    k_total: int = K
    seed: int = 42
    layers: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"name": "a.weight", "shape": (2, 3), "offset": 0, "k_left": 1, "k_right": 2},
            {"name": "b.weight", "shape": (4, 3), "offset": 2, "k_left": 2, "k_right": 2},
        ]
    )

    def manifest(self) -> dict[str, Any]:
        return {
            "projection": "gaussian",
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "verified": True,
            "layers": self.layers,
        }


def batch(start: int, stop: int, dtype: torch.dtype = torch.float32) -> StoredRows:
    """Return the rows that every store here has at these ordinals."""
    ordinals = torch.arange(start, stop)
    rows = (ordinals[:, None] * K + torch.arange(K)) % 256 - 100  # exact in every dtype
    return StoredRows(ordinals * 3 + 1, rows.to(dtype), None)


def fill(store: GradientStore, stop: int, step: int = 5, with_loss: bool = False) -> None:
    for start in range(len(store), stop, step):
        rows = batch(start, min(start + step, stop), store.dtype)
        store.append(rows, loss=rows.ids / 7 if with_loss else None)


def assert_holds(store: GradientStore, n: int) -> None:
    expected = batch(0, n, store.dtype)
    assert len(store) == n
    assert torch.equal(store.ids, expected.ids)
    assert store.rows().dtype == store.dtype
    assert torch.equal(store.rows(), expected.rows)


def files(root) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def make(root, n: int, unit: int = 4, with_loss: bool = False, **given: Any) -> GradientStore:
    with GradientStore.create(root, FakeEngine(), unit=unit, **given) as store:
        fill(store, n, with_loss=with_loss)
    return store


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
    assert files(tmp_path / "g") == names | {"manifest.json", ".lock"}
    assert shard_path(tmp_path, 12345) == tmp_path / "shards/00012/g-00012345.safetensors"


def test_a_shard_tells_what_it_is_without_ghost(tmp_path):
    store = make(tmp_path / "g", 10, with_loss=True)
    path = shard_path(tmp_path / "g", 1)
    tensors = load_file(path)
    assert torch.equal(tensors["g"], batch(4, 8).rows)
    assert torch.equal(tensors["ids"], batch(4, 8).ids)
    assert torch.equal(tensors["loss"], batch(4, 8).ids / 7)
    digest = hashlib.sha256()
    for name in ("g", "ids", "loss"):
        digest.update(tensors[name].numpy().tobytes())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "fingerprint": store.manifest.fingerprint,
            "unit": "1",
            "sha256": digest.hexdigest(),
        }


def test_the_manifest_is_readable_and_its_fingerprint_can_be_recomputed(tmp_path):
    make(tmp_path / "g", 3, info={"model": "abc", "loss": "nll"}, notes={"who": "me"})
    content = json.loads((tmp_path / "g/manifest.json").read_text())
    assert content["schema"] == 1
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


def test_a_reader_sees_the_store_as_it_was_opened(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 6)
        store.commit()
        reader = GradientStore.open(tmp_path / "g")
        fill(store, 23)
        store.commit()
        assert_holds(reader, 6)
        reader.verify()


def test_a_shard_that_is_replaced_while_it_is_opened_is_read_again(tmp_path, monkeypatch):
    """safetensors reads header and data separately, which may be of two versions."""
    store = GradientStore.create(tmp_path / "g", FakeEngine(), unit=4)
    fill(store, 2)
    store.commit()
    reader = GradientStore.open(tmp_path / "g")
    opened = []

    def replaced_once(path, framework):
        file = safe_open(path, framework)
        if not opened:
            fill(store, 3)
            store.commit()
        opened.append(path)
        return file

    monkeypatch.setattr("ghost_engines.store.shards.safe_open", replaced_once)
    assert torch.equal(reader.rows(), batch(0, 2).rows)
    assert len(opened) == 2
    store.close()


def test_a_writer_can_read_while_it_writes_on(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 6)
        blocks = store.blocks(2)
        seen = [next(blocks)]
        fill(store, 23)
        seen += list(blocks)
    assert torch.equal(torch.cat([block.rows for block in seen]), batch(0, 6).rows)


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
    with pytest.raises(StoreError, match=r"no store at .*create\("):
        GradientStore.open(tmp_path / "none")
    with pytest.raises(StoreError, match=r"no store at .*create\("):
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


# Tampered files


def assert_damaged(root, *names: str) -> None:
    for act in (GradientStore.open, lambda path: GradientStore.resume(path, FakeEngine())):
        with pytest.raises(DamagedStoreError) as caught:
            act(root)
        for name in names:
            assert name in str(caught.value)


def rewrite(path, tensors: dict[str, Tensor] | None = None, **metadata: str) -> None:
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(found if tensors is None else tensors, path, {**kept, **metadata})


def test_missing_shards_are_named(tmp_path):
    make(tmp_path / "g", 22)
    shard_path(tmp_path / "g", 1).unlink()
    shard_path(tmp_path / "g", 3).unlink()
    assert_damaged(tmp_path / "g", "g-00000001.safetensors is missing", "g-00000003.safetensors")


@pytest.mark.parametrize("unit", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_shards_that_were_cut_off_are_named(tmp_path, unit, size):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", unit)
    path.write_bytes(path.read_bytes()[:size])
    assert_damaged(tmp_path / "g", f"{path} is cut off")


def test_a_shard_of_another_store_is_named(tmp_path):
    make(tmp_path / "g", 11)
    make(tmp_path / "other", 11, info={"model": "other"})
    shutil.copy(shard_path(tmp_path / "other", 1), shard_path(tmp_path / "g", 1))
    assert_damaged(tmp_path / "g", "g-00000001.safetensors belongs to another store")


def test_a_shard_in_another_ones_place_is_named(tmp_path):
    make(tmp_path / "g", 11)
    shutil.copy(shard_path(tmp_path / "g", 0), shard_path(tmp_path / "g", 1))
    assert_damaged(tmp_path / "g", "g-00000001.safetensors holds unit 0")


def test_a_shard_in_the_wrong_folder_is_named(tmp_path):
    make(tmp_path / "g", 11)
    wrong = tmp_path / "g/shards/00007/g-00000003.safetensors"
    wrong.parent.mkdir()
    shutil.copy(shard_path(tmp_path / "g", 0), wrong)
    assert_damaged(tmp_path / "g", str(wrong))


def test_a_partial_shard_before_the_last_is_named(tmp_path):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", 1)
    rewrite(path, {name: tensor[:2].clone() for name, tensor in load_file(path).items()})
    assert_damaged(tmp_path / "g", "g-00000001.safetensors holds 2 rows, not 4")


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {"g": found["g"].int(), "ids": found["ids"]},
        lambda found: {"g": found["g"][:, :5].clone(), "ids": found["ids"]},
        lambda found: {"g": found["g"], "ids": found["ids"][:3].clone()},
        lambda found: {"g": found["g"]},
        lambda found: {**found, "more": found["ids"].clone()},
        lambda found: {**found, "loss": found["ids"].clone()},
        lambda found: {**found, "loss": torch.zeros(2)},
    ],
    ids=["dtype", "columns", "fewer ids", "no ids", "one more", "loss dtype", "fewer losses"],
)
def test_a_shard_with_other_contents_is_named(tmp_path, change):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", 1)
    rewrite(path, change({name: tensor.clone() for name, tensor in load_file(path).items()}))
    assert_damaged(tmp_path / "g", f"{path} was altered")


def test_losses_in_some_shards_only_are_named(tmp_path):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", 1)
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    rewrite(path, {**found, "loss": torch.zeros(4)})
    assert_damaged(tmp_path / "g", "same kind of loss")


def test_altered_contents_are_found_by_their_hash(tmp_path):
    make(tmp_path / "g", 11)
    for unit in (0, 2):
        path = shard_path(tmp_path / "g", unit)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    store = GradientStore.open(tmp_path / "g")
    with pytest.raises(DamagedStoreError) as caught:
        store.verify()
    for unit, named in enumerate([True, False, True]):
        assert (str(shard_path(tmp_path / "g", unit)) in str(caught.value)) == named


def test_a_file_that_goes_missing_later_is_named(tmp_path):
    make(tmp_path / "g", 11)
    store = GradientStore.open(tmp_path / "g")
    shard_path(tmp_path / "g", 1).unlink()
    for act in (store.rows, store.verify, lambda: store.ids, lambda: list(store.blocks())):
        with pytest.raises(DamagedStoreError, match=r"g-00000001\.safetensors is missing"):
            act()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[1]", "is not a store's manifest"),
        (lambda text: "{}", "is not a store's manifest"),
        (lambda text: text.replace('"seed": 42', '"seed": 43'), "was altered"),
        (lambda text: text.replace('"unit": 4', '"unit": 5'), "was altered"),
        (lambda text: text.replace('"unit"', '"units"'), "is not a store's manifest"),
    ],
    ids=["cut off", "empty", "list", "nothing in it", "seed", "unit", "key"],
)
def test_a_manifest_that_was_altered_is_named(tmp_path, change, message):
    make(tmp_path / "g", 11)
    path = tmp_path / "g/manifest.json"
    path.write_text(change(path.read_text()))
    assert_damaged(tmp_path / "g", str(path), message)


def test_a_newer_format_is_told_from_damage(tmp_path):
    make(tmp_path / "g", 3)
    path = tmp_path / "g/manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(
        StoreError, match="format version 2, this version of ghost reads 1"
    ) as caught:
        GradientStore.open(tmp_path / "g")
    assert not isinstance(caught.value, DamagedStoreError)
