"""Stores that are exported, read by other programs."""

import json

import numpy as np
import pytest
import torch
from store_kit import DTYPES, FakeEngine, batch, files

from ghost_engines.store import GradientStore, StoreError, export

COLUMNS = {"loss": "float64", "n": "int32", "half": "bfloat16", "group": "category"}


def store_of(root, n, dtype=torch.float32):
    with GradientStore.create(root, FakeEngine(dtype), unit=4, columns=COLUMNS) as store:
        columns = {
            "loss": torch.arange(n).double() / 3,
            "n": torch.arange(n).int(),
            "half": torch.arange(n).bfloat16(),
            "group": [f"é{at % 3}" for at in range(n)],
        }
        store.append(batch(0, n, dtype), columns=columns)
    return GradientStore.open(root)


def expected_rows(n, dtype):
    rows = batch(0, n, dtype).rows
    return (rows.float() if dtype == torch.bfloat16 else rows).numpy()


@pytest.mark.parametrize(("n", "dtype"), [(0, torch.bfloat16), *((11, dtype) for dtype in DTYPES)])
def test_a_folder_of_npy_files_has_all_that_the_store_has(tmp_path, n, dtype):
    store = store_of(tmp_path / "g", n, dtype)
    export(store, tmp_path / "out")
    rows = np.load(tmp_path / "out/rows.npy", mmap_mode="r")
    expected = expected_rows(n, dtype)
    assert rows.dtype == expected.dtype
    assert np.array_equal(rows, expected)
    assert np.array_equal(np.load(tmp_path / "out/ids.npy"), batch(0, n).ids.numpy())
    assert np.array_equal(np.load(tmp_path / "out/loss.npy"), np.arange(n) / 3)
    assert np.load(tmp_path / "out/n.npy").dtype == np.int32
    names = json.loads((tmp_path / "out/group.names.json").read_text())
    groups = [names[code] for code in np.load(tmp_path / "out/group.npy")]
    assert groups == [f"é{at % 3}" for at in range(n)]
    assert len(files(tmp_path / "out")) == 7


@pytest.mark.parametrize(("n", "dtype"), [(0, torch.bfloat16), *((11, dtype) for dtype in DTYPES)])
def test_a_parquet_file_has_all_that_the_store_has(tmp_path, n, dtype):
    pq = pytest.importorskip("pyarrow.parquet")
    store = store_of(tmp_path / "g", n, dtype)
    export(store, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "row", "loss", "group", "half", "n"]
    expected = expected_rows(n, dtype)
    rows = table["row"].combine_chunks()
    assert rows.type.list_size == 6
    found = rows.flatten().to_numpy().reshape(n, 6)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert table["id"].to_pylist() == batch(0, n).ids.tolist()
    assert table["loss"].to_pylist() == [at / 3 for at in range(n)]
    assert table["group"].to_pylist() == [f"é{at % 3}" for at in range(n)]
    assert table["half"].to_pylist() == [float(at) for at in range(n)]
    assert str(table["n"].type) == "int32"


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_what_cannot_be_exported_leaves_nothing(tmp_path, name, monkeypatch):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    store = store_of(tmp_path / "g", 11)
    before = files(tmp_path)
    real = GradientStore.blocks

    def interrupted(self, size):
        yield next(real(self, size))
        raise KeyboardInterrupt

    monkeypatch.setattr(GradientStore, "blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / name)
    assert files(tmp_path) == before
    monkeypatch.undo()
    export(store, tmp_path / name)
    with pytest.raises(StoreError, match="there is something at"):
        export(store, tmp_path / name)


def test_other_kinds_of_files_and_folders_that_are_not_there_are_refused(tmp_path):
    store = store_of(tmp_path / "g", 3)
    with pytest.raises(StoreError, match="neither a Parquet file nor a folder"):
        export(store, tmp_path / "out.csv")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export(store, tmp_path / "none/out")


@pytest.mark.parametrize(
    ("column", "refused", "taken"),
    [("id", "o.parquet", "o"), ("row", "o.parquet", "o"), ("rows", "o", "o.parquet")],
)
def test_columns_of_older_stores_do_not_replace_rows_or_ids(
    tmp_path, column, refused, taken, monkeypatch
):
    """They are read, gone on with, and exported where their names are free."""
    pq = pytest.importorskip("pyarrow.parquet")
    engine, columns = FakeEngine(), {column: "int64"}
    monkeypatch.setattr("ghost_engines.store.store.check_new", lambda columns: None)
    with GradientStore.create(tmp_path / "g", engine, columns=columns) as store:
        store.append(batch(0, 3), columns={column: torch.arange(3)})
    monkeypatch.undo()
    with GradientStore.resume(tmp_path / "g", engine, columns=columns) as store:
        store.append(batch(3, 5), columns={column: torch.arange(3, 5)})
    store, before = GradientStore.open(tmp_path / "g"), files(tmp_path)
    with pytest.raises(StoreError, match=f"column '{column}' of the store cannot be exported"):
        export(store, tmp_path / refused)
    assert files(tmp_path) == before
    export(store, tmp_path / taken)
    if taken == "o":
        found = np.load(tmp_path / f"o/{column}.npy").tolist()
    else:
        found = pq.read_table(tmp_path / taken)[column].to_pylist()
    assert found == list(range(5))
