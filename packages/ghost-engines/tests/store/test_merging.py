"""Stores that are merged: the rows of all, once, whatever happened in between."""

import itertools

import pytest
import torch
from fork_kit import run_script
from store_kit import FakeEngine, assert_holds, batch, files, fill, make

from ghost_core import UnknownNameError
from ghost_engines.store import Column, DataFile, GradientStore, StoredRows, StoreError, merge
from ghost_engines.store.listing import shard_path

COLUMNS = {"n": "int64", "group": "category"}


def source(root, start, stop, unit=4, **given):
    given = {"columns": COLUMNS, **given}
    with GradientStore.create(root, FakeEngine(), unit=unit, **given) as store:
        rows = batch(start, stop)
        groups = [f"g{n % 3}" for n in range(start, stop)]
        columns = {"n": torch.arange(start, stop), "group": groups}
        store.append(rows, rows.ids / 7, columns=columns if given["columns"] else None)
    return root


def sources(root):
    return [source(root / "a", 0, 9), source(root / "b", 9, 11, unit=3), source(root / "c", 11, 23)]


def assert_merged(store, n):
    assert_holds(store, n)
    assert torch.equal(store.losses, batch(0, n).ids / 7)
    assert torch.equal(store.columns["n"], torch.arange(n))
    assert list(store.groups) == [f"g{at % 3}" for at in range(n)]
    store.verify()


@pytest.mark.parametrize("unit", [None, 5])
def test_merged_rows_come_one_store_after_the_other(tmp_path, unit):
    merged = merge(sources(tmp_path), tmp_path / "m", unit=unit)
    assert_merged(merged, 23)
    assert merged.manifest.unit == (unit or 4)
    for name, n in (("a", 9), ("b", 2), ("c", 12)):
        assert len(GradientStore.open(tmp_path / name)) == n


def test_parts_are_merged_into_a_store_of_one_writer_which_can_be_gone_on_with(tmp_path):
    for rank in range(2):
        with GradientStore.join(tmp_path / "g", FakeEngine(), part=(rank, 2), unit=4) as store:
            for start in range(4 * rank, 16, 8):
                store.append(batch(start, start + 4))
    assert_holds(merge([tmp_path / "g"], tmp_path / "m"), 16)
    with GradientStore.resume(tmp_path / "m", FakeEngine()) as store:
        fill(store, 19)
    assert_holds(GradientStore.open(tmp_path / "m"), 19)


@pytest.mark.parametrize(
    "n", [0, 9, *(pytest.param(n, marks=pytest.mark.stress) for n in (1, 10, 22))]
)
def test_a_merge_that_was_interrupted_goes_on(tmp_path, n, monkeypatch):
    given = sources(tmp_path)
    whole = merge(given, tmp_path / "whole")
    monkeypatch.setattr("ghost_engines.store.merging._BLOCK", 1)
    real, count = GradientStore.append, itertools.count()

    def interrupted(*arguments, **named):
        if next(count) == n:
            raise KeyboardInterrupt
        real(*arguments, **named)

    monkeypatch.setattr(GradientStore, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(given, tmp_path / "m")
    assert len(GradientStore.open(tmp_path / "m")) == n  # what was done stays
    monkeypatch.setattr(GradientStore, "append", real)
    assert_merged(merge(given, tmp_path / "m"), 23)
    for name in files(whole.path):
        assert (tmp_path / "m" / name).read_bytes() == (whole.path / name).read_bytes()
    assert_merged(merge(given, tmp_path / "m"), 23)


def test_a_merge_does_not_go_on_with_what_others_wrote(tmp_path):
    given = sources(tmp_path)
    for into, start, stop in (("other", 1, 3), ("longer", 0, 30)):
        source(tmp_path / into, start, stop)
        with pytest.raises(StoreError, match="what merging these stores begins with"):
            merge(given, tmp_path / into)
    source(tmp_path / "row", 0, 3)
    with GradientStore.create(tmp_path / "rows", FakeEngine(), unit=4, columns=COLUMNS) as store:
        rows = batch(0, 2)
        columns = {"n": torch.arange(2), "group": ["g0", "g1"]}
        store.append(StoredRows(rows.ids, rows.rows + 1), rows.ids / 7, columns=columns)
    for into, named in (("rows", {}), ("row", {"unit": 7}), ("row", {"duplicates": "replace"})):
        with pytest.raises(StoreError, match="what merging these stores begins with"):
            merge(given, tmp_path / into, **named)


@pytest.mark.parametrize("change", ["loss", "n", "group"])
def test_a_merge_does_not_go_on_with_the_same_rows_beside_other_values(tmp_path, change):
    given = {"loss": batch(0, 6).ids / 7, "n": torch.arange(6), "group": ["g"] * 6}
    other = {**given, change: ["h"] * 6 if change == "group" else given[change] + 1}
    for name, columns in (("a", other), ("m", given)):
        with GradientStore.create(tmp_path / name, FakeEngine(), unit=4, columns=COLUMNS) as store:
            for part in (slice(0, 3), slice(3, 6))[: 2 if name == "a" else 1]:
                some = {name: values[part] for name, values in columns.items()}
                loss = some.pop("loss")
                store.append(batch(0, 6)[part], loss, columns=some)
    with pytest.raises(StoreError, match="what merging these stores begins with"):
        merge([tmp_path / "a"], tmp_path / "m")
    assert len(GradientStore.open(tmp_path / "m")) == 3


def test_a_merge_goes_on_with_numbers_that_are_none(tmp_path):
    columns = {"f": Column("float32", finite=False)}
    for name, n in (("a", 6), ("m", 3)):
        with GradientStore.create(tmp_path / name, FakeEngine(), unit=4, columns=columns) as store:
            store.append(batch(0, n), columns={"f": torch.full((n,), torch.nan)})
    assert_holds(merge([tmp_path / "a"], tmp_path / "m"), 6)


def test_samples_that_several_stores_have_are_refused_or_replaced(tmp_path):
    given = [source(tmp_path / "a", 0, 9), source(tmp_path / "b", 7, 12)]
    with pytest.raises(StoreError, match="samples 22, 25 are there more than once"):
        merge(given, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merged = merge(given, tmp_path / "m", duplicates="replace")
    assert_merged(merged, 12)
    assert_merged(merge(given, tmp_path / "m", duplicates="replace"), 12)
    with pytest.raises(UnknownNameError, match="duplicates"):
        merge(given, tmp_path / "n", duplicates="keep")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"info": {"x": 1}}, "info"),
        ({"data": [DataFile("x", "y")]}, "data"),
        ({"columns": None}, "columns"),
    ],
)
def test_rows_of_other_kinds_are_not_merged(tmp_path, other, told):
    given = [source(tmp_path / "a", 0, 9), source(tmp_path / "b", 9, 12, **other)]
    with pytest.raises(StoreError, match=f"not of the kind of those.*{told}"):
        merge(given, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_losses_must_be_of_one_kind(tmp_path):
    make(tmp_path / "a", 3, with_loss=True)
    with GradientStore.create(tmp_path / "b", FakeEngine(), unit=4) as store:
        store.append(batch(3, 5))
    with pytest.raises(StoreError, match="kind of loss"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    with pytest.raises(StoreError, match="nothing to merge"):
        merge([], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_source_stays_as_it_is_when_it_is_named_as_the_target(tmp_path):
    given = sources(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    (tmp_path / "link").symlink_to(given[0])
    for into in (given[0], given[2], tmp_path / "link"):
        with pytest.raises(StoreError, match="one of those that are to be merged"):
            merge(given, into)
    (tmp_path / "link").unlink()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_an_altered_source_is_noticed(tmp_path):
    given = sources(tmp_path)
    path = shard_path(given[0], 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="was altered"):
        merge(given, tmp_path / "m")


KILLED = """
    # Kills a merge at each of its steps, and lets it go on.
    import itertools, shutil, sys
    from pathlib import Path

    import torch
    from fork_kit import finish, fork, kill_at

    from ghost_engines.store import GradientStore, StoredRows, merge

    torch.set_num_threads(1)


    class Engine:
        k_total, dtype = 3, torch.float32

        def manifest(self):
            return {}


    root = Path(sys.argv[1])
    given = [root / "a", root / "b"]
    for at, path in enumerate(given):
        with GradientStore.create(path, Engine(), unit=8) as store:
            ids = torch.arange(at * 20, at * 20 + 20)
            store.append(StoredRows(ids, ids[:, None] * torch.ones(3)))
    sources = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for step in itertools.count():
        def killed(acknowledge):
            kill_at(step)
            merge(given, root / "m")

        status, _ = finish(*fork(killed))
        assert {path: path.read_bytes() for path in sources} == sources
        merged = merge(given, root / "m")
        assert merged.ids.tolist() == list(range(40))
        assert merged.rows()[:, 2].tolist() == list(range(40))
        merged.verify()
        shutil.rmtree(root / "m")
        if status == 0:
            assert step > 30
            break
"""


@pytest.mark.stress
def test_a_merge_that_is_killed_at_any_step_goes_on(fresh, tmp_path):
    run_script(fresh, KILLED, tmp_path)
