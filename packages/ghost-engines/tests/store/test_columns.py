"""Columns beside the rows, next to what was appended."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from store_kit import FakeEngine, assert_holds, batch

from ghost_engines.store import (
    Column,
    DamagedStoreError,
    DataFile,
    GradientStore,
    Labels,
    StoredRows,
    StoreError,
)
from ghost_engines.store.listing import shard_path

COLUMNS = {"norm": "float32", "group": "category", "begin": "int64", "end": "int64"}
DOMAINS = ["web", "code", "Ǆ 本\n", ""]


def columns(start, stop):
    """Return what the rows at these ordinals have beside them."""
    ordinals = torch.arange(start, stop)
    return {
        "norm": ordinals.float() / 3,
        "group": [DOMAINS[n * n // 7 % 4] for n in range(start, stop)],
        "begin": ordinals * 10**12,
        "end": (ordinals * 10**12 + 7).numpy(),
    }


def fill(store, stop, step=3, make=lambda given: given):
    for start in range(len(store), stop, step):
        rows = batch(start, min(start + step, stop))
        store.append(rows, rows.ids / 7, columns=make(columns(start, start + len(rows))))


def assert_columns(found, start, stop):
    expected = columns(start, stop)
    assert torch.equal(found["norm"], expected["norm"])
    assert torch.equal(found["begin"], expected["begin"])
    assert torch.equal(found["end"], torch.from_numpy(expected["end"]))
    assert list(found["group"]) == expected["group"]


@pytest.mark.parametrize("step", [1, 3, 4, 30])
def test_columns_come_back_with_their_rows(tmp_path, step):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4, columns=COLUMNS) as store:
        fill(store, 7, step)
        assert_columns(store.columns, 0, len(store))  # some are in memory
    with GradientStore.resume(tmp_path / "g", FakeEngine(), columns=COLUMNS) as store:
        fill(store, 14, step)
        assert_columns(store.columns, 0, len(store))
    read = GradientStore.open(tmp_path / "g")
    n = len(read)
    assert_holds(read, n)
    assert set(read.columns) == {*COLUMNS, "loss"}
    assert torch.equal(read.losses, batch(0, n).ids / 7)
    assert_columns(read.columns, 0, n)
    at = 0
    for block in read.blocks(3):
        assert_columns(block.columns, at, at + len(block))
        at += len(block)
    read.verify()


def test_names_are_small_numbers_with_a_table(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4, columns=COLUMNS) as store:
        fill(store, 14)
        given = columns(0, 14)["group"]
    groups = GradientStore.open(tmp_path / "g").groups
    assert groups.codes.dtype == torch.int32
    assert sorted(groups.names) == sorted(set(given))
    for name in (*DOMAINS, "none"):
        assert groups.equal(name).tolist() == [each == name for each in given]
    assert groups[13] == given[13]
    tensors = load_file(shard_path(tmp_path / "g", 1))
    names = json.loads(tensors["group.names"].numpy().tobytes())
    assert [names[code] for code in tensors["group"]] == given[4:8]
    assert len(names) == len(set(given[4:8]))


def test_a_shard_depends_on_its_rows_alone_whatever_names_came_before(tmp_path):
    """Nor on how batches were cut, or on the kind in which names were given."""
    as_labels = {
        "tuple": lambda given: {**given, "group": tuple(given["group"])},
        "array": lambda given: {**given, "group": np.array(given["group"])},
        "labels": lambda given: {
            **given,
            "group": Labels(torch.tensor([DOMAINS.index(g) for g in given["group"]]), DOMAINS),
        },
    }
    written = []
    for step, (name, make) in enumerate(as_labels.items(), start=2):
        with GradientStore.create(tmp_path / name, FakeEngine(), unit=4, columns=COLUMNS) as store:
            fill(store, 5, step, make)
        with GradientStore.resume(tmp_path / name, FakeEngine()) as store:
            fill(store, 14, step, make)
        written.append([shard_path(tmp_path / name, unit).read_bytes() for unit in range(4)])
    assert written[0] == written[1] == written[2]


def test_losses_can_be_declared_and_then_must_be_there(tmp_path):
    engine = FakeEngine()
    with GradientStore.create(tmp_path / "g", engine, columns={"loss": "float64"}) as store:
        store.append(batch(0, 2), torch.tensor([1.0, 2.0], dtype=torch.float64))
        store.append(batch(2, 3), columns={"loss": np.array([3.0])})
        with pytest.raises(StoreError, match="no column loss"):
            store.append(batch(3, 4))
        with pytest.raises(StoreError, match="nothing is cast"):
            store.append(batch(3, 4), torch.ones(1))
        one = torch.ones(1, dtype=torch.float64)
        with pytest.raises(StoreError, match="two columns of losses"):
            store.append(batch(3, 4), one, columns={"loss": 2 * one})
        with pytest.raises(StoreError, match="must be a mapping"):
            store.append(batch(3, 4), one, columns=[one])
    read = GradientStore.open(tmp_path / "g")
    assert read.losses.tolist() == [1.0, 2.0, 3.0]
    assert dict(read.columns).keys() == {"loss"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm": None}, "no column norm"),
        ({"extra": torch.ones(3)}, "has no column extra; it has begin, end, group, norm"),
        ({"norm": torch.ones(2)}, r"norm must be float32 \[3\]"),
        ({"norm": torch.ones(3, 1)}, r"norm must be float32 \[3\]"),
        ({"norm": torch.ones(3).double()}, "nothing is cast"),
        ({"norm": torch.tensor([1.0, torch.nan, torch.inf])}, r"not finite in rows \[1, 2\]"),
        ({"norm": [1.0, 2.0, 3.0]}, "must be a tensor or an array"),
        ({"end": np.array([1, 2, None])}, "not an array of object"),
        ({"begin": np.arange(3, dtype=np.uint64)}, "not an array of uint64"),
        ({"group": ["web", "code"]}, "must have 3 strings"),
        ({"group": "web"}, "must have 3 strings"),
        ({"group": ["web", 3, "code"]}, "strings, not 3"),
        ({"group": torch.ones(3)}, "must have 3 strings"),
        ({"group": ["web", 0, "code"]}, "strings, not 0"),
        ({"group": ["web", None, "code"]}, "strings, not None"),
        ({"group": Labels(torch.zeros(3).int(), [0])}, "strings, not 0"),
        ({"group": ["web", "a\ud800", "b"]}, r"has '.ud800', which is no text"),
        ({"group": Labels(torch.zeros(3).int(), ["\udc00"])}, r"has '.udc00', which is no text"),
    ],
)
def test_columns_that_do_not_fit_are_refused_and_nothing_is_stored(tmp_path, change, told):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4, columns=COLUMNS) as store:
        given = {**columns(0, 3), **change}
        given = {name: value for name, value in given.items() if value is not None}
        with pytest.raises(StoreError, match=told):
            store.append(batch(0, 3), columns=given)
        assert len(store) == 0
        store.append(batch(0, 3), columns=columns(0, 3))
        assert_columns(store.columns, 0, 3)


def test_nan_is_kept_where_it_is_allowed(tmp_path):
    declared = {"score": Column("float32", finite=False)}
    with GradientStore.create(tmp_path / "g", FakeEngine(), columns=declared) as store:
        store.append(batch(0, 2), columns={"score": torch.tensor([torch.nan, -torch.inf])})
    score = GradientStore.open(tmp_path / "g").columns["score"]
    assert score.isnan().tolist() == [True, False]
    assert score[1] == -torch.inf


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"g": "float32"}, "cannot be the name"),
        ({"ids": "int64"}, "cannot be the name"),
        ({"__metadata__": "int64"}, "cannot be the name"),
        ({"id": "int64"}, "'id' cannot be the name"),
        ({"row": "int64"}, "'row' cannot be the name"),
        ({"rows": "int64"}, "'rows' cannot be the name"),
        ({"a.b": "float32"}, "cannot be the name"),
        ({3: "float32"}, "cannot be the name"),
        ({"norm": "float8"}, "cannot be declared"),
        ({"norm": torch.float32}, "cannot be declared"),
        ({"norm": Column("float32", finite=1)}, "cannot be declared"),
        ({"loss": "category"}, "losses are one of"),
        (["norm"], "must be a mapping"),
    ],
)
def test_what_cannot_be_declared_is_refused_before_there_is_a_store(tmp_path, declared, told):
    with pytest.raises(StoreError, match=told):
        GradientStore.create(tmp_path / "g", FakeEngine(), columns=declared)
    with pytest.raises(StoreError, match=told):
        GradientStore.join(tmp_path / "g", FakeEngine(), part="a", columns=declared)
    assert not (tmp_path / "g").exists()


def test_a_resume_with_other_columns_is_refused(tmp_path):
    GradientStore.create(tmp_path / "g", FakeEngine(), columns=COLUMNS).close()
    with pytest.raises(StoreError, match=r"columns\.norm"):
        GradientStore.resume(
            tmp_path / "g", FakeEngine(), columns={**COLUMNS, "norm": Column("float32", False)}
        )


def test_an_altered_column_or_table_of_names_is_found_when_it_is_read(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4, columns=COLUMNS) as store:
        fill(store, 14)
    path = shard_path(tmp_path / "g", 0)
    intact = path.read_bytes()
    for name, found in (("norm", b"\xab\xaa\xaa\x3e"), ("group", b"web")):
        data = bytearray(intact)
        assert intact.count(found) == 1
        data[intact.index(found)] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedStoreError, match=f"g-00000000.* its {name}"):
            GradientStore.open(tmp_path / "g").columns[name]
        with pytest.raises(DamagedStoreError, match="g-00000000"):
            GradientStore.open(tmp_path / "g").verify()


def test_the_manifest_knows_the_data_and_their_digest_counts_wherever_they_are(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"text")
    file = DataFile.of(path)
    assert file == DataFile(str(path), "sha256:" + hashlib.sha256(b"text").hexdigest())
    with GradientStore.create(tmp_path / "g", FakeEngine(), data=[file]) as store:
        store.append(batch(0, 3))
    assert GradientStore.open(tmp_path / "g").manifest.data == [
        {"path": str(path), "digest": file.digest}
    ]
    GradientStore.resume(tmp_path / "g", FakeEngine()).close()
    moved = DataFile("elsewhere", file.digest)
    GradientStore.resume(tmp_path / "g", FakeEngine(), data=[moved]).close()
    with pytest.raises(StoreError, match=r"data\[0\]"):
        GradientStore.resume(tmp_path / "g", FakeEngine(), data=[DataFile(str(path), "other")])
    with pytest.raises(StoreError, match="list of DataFile"):
        GradientStore.create(tmp_path / "h", FakeEngine(), data=[str(path)])


def test_one_unit_is_read_into_memory_once_and_shared_with_numpy(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4, columns=COLUMNS) as store:
        store.append(StoredRows(batch(0, 4).ids, batch(0, 4).rows), columns=columns(0, 4))
    norms = GradientStore.open(tmp_path / "g").columns["norm"]
    norms.numpy()[2] = 5
    assert norms[2] == 5
