"""Samples that are stored again: an error, or the later row replaces the earlier one."""

import numpy as np
import pytest
import torch
from store_kit import FakeEngine, assert_holds, batch, fill, make

from ghost_core import UnknownNameError
from ghost_engines.store import GradientStore, StoredRows, StoreError


def appended(store, ids, value):
    """Append rows of one value, and the columns that tell which append it was."""
    ids = torch.tensor(ids)
    rows = StoredRows(ids, torch.full((len(ids), 6), float(value)))
    columns = {"n": torch.full((len(ids),), value), "group": [f"g{value}"] * len(ids)}
    store.append(rows, columns=columns)


def replacing(root, draws, unit=4):
    """Write random samples again and again; return the last value of each, in order of writing."""
    last = {}
    columns = {"n": "int64", "group": "category"}
    with GradientStore.create(
        root, FakeEngine(), unit=unit, columns=columns, duplicates="replace"
    ) as store:
        for value in range(draws):
            ids = np.random.default_rng(value).integers(0, 12, 3).tolist()
            appended(store, ids, value)
            for sample in ids:
                last.pop(sample, None)
                last[sample] = value
    return last


def test_a_sample_that_is_stored_already_is_refused_with_its_batch(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=4) as store:
        fill(store, 6)
        for again in (batch(5, 8), batch(0, 1), StoredRows(torch.tensor([1]), torch.ones(1, 6))):
            with pytest.raises(StoreError, match="stored already") as caught:
                store.append(again)
            assert "replace" in caught.value.remedy
        with pytest.raises(StoreError, match="samples 8 are in it twice"):
            store.append(StoredRows(torch.tensor([8, 100, 8]), torch.ones(3, 6)))
        assert_holds(store, 6)
        fill(store, 9)
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        with pytest.raises(StoreError, match="samples 1 are stored already"):
            store.append(batch(0, 1))
        fill(store, 11)
    assert_holds(GradientStore.open(tmp_path / "g"), 11)


@pytest.mark.parametrize("draws", [1, 2, 9, 30])
def test_the_later_row_replaces_the_earlier_for_whoever_reads(tmp_path, draws):
    last = replacing(tmp_path / "g", draws)
    store = GradientStore.open(tmp_path / "g")
    ids, values = list(last), torch.tensor(list(last.values()))
    assert store.ids.tolist() == ids
    assert len(store) == store.committed == len(ids)
    assert torch.equal(store.rows()[:, 0], values.float())
    assert torch.equal(store.rows_by_id(ids)[:, 5], values.float())
    assert torch.equal(store.columns["n"], values)
    assert list(store.groups) == [f"g{value}" for value in last.values()]
    for start in range(len(ids)):
        assert torch.equal(store.rows(start)[:, 0], values[start:].float())
    for size in (1, 3, 100):
        blocks = [block.copy() for block in store.blocks(size)]
        assert torch.equal(torch.cat([block.rows[:, 1] for block in blocks]), values.float())
        scanned = [block.copy() for block in store.scan(size)]
        assert torch.cat([block.ids for block in scanned]).tolist() == ids
        assert torch.equal(torch.cat([block.rows[:, 1] for block in scanned]), values.float())
    store.verify()


@pytest.mark.parametrize("block", [3, 4096])
def test_a_search_finds_the_rows_that_count_alone(tmp_path, block):
    last = replacing(tmp_path / "g", 20)
    found = GradientStore.open(tmp_path / "g").search(torch.ones(1, 6), 100, block=block)
    best = sorted(last, key=lambda sample: (-last[sample], list(last).index(sample)))
    assert found.ids.tolist() == [best]
    assert found.scores.tolist() == [[6.0 * last[sample] for sample in best]]


def test_a_reader_goes_on_as_it_was_opened_while_rows_are_replaced(tmp_path):
    engine = FakeEngine()
    with GradientStore.create(tmp_path / "g", engine, unit=4, duplicates="replace") as store:
        fill(store, 6)
        store.commit()
        reader = GradientStore.open(tmp_path / "g")
        store.append(batch(0, 6))
        store.commit()
        assert_holds(reader, 6)
        assert len(store) == 12  # a writer has all that it appended
    assert sorted(GradientStore.open(tmp_path / "g").ids.tolist()) == batch(0, 6).ids.tolist()


def test_samples_of_several_parts_are_replaced_too(tmp_path):
    for part, value in (("a", 1), ("b", 2)):
        with GradientStore.join(
            tmp_path / "g",
            FakeEngine(),
            part=part,
            columns={"n": "int64", "group": "category"},
            duplicates="replace",
        ) as store:
            appended(store, [5, 6 + value], value)
    store = GradientStore.open(tmp_path / "g")
    assert store.ids.tolist() == [7, 5, 8]
    assert store.columns["n"].tolist() == [1, 2, 2]


def test_what_becomes_of_duplicates_is_part_of_the_store(tmp_path):
    with pytest.raises(UnknownNameError, match="duplicates"):
        make(tmp_path / "g", 3, duplicates="keep")
    made = make(tmp_path / "g", 3, duplicates="replace").manifest
    assert made.duplicates == "replace"
    assert made.fingerprint != make(tmp_path / "h", 3).manifest.fingerprint
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        store.append(batch(0, 2))
    assert GradientStore.open(tmp_path / "g").ids.tolist() == batch(0, 3).ids.roll(1).tolist()
