"""Rows by the ids of their samples, next to a loop over all of them."""

import numpy as np
import pytest
import torch
from store_kit import FakeEngine, batch, fill, make

from ghost_core import CaptureError
from ghost_engines.store import GradientStore, StoredRows, StoreError


def shuffled(root, n=23):
    """Make a store whose ids come in no order; return it with its rows by id."""
    rows = batch(0, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    with GradientStore.create(root, FakeEngine(), unit=4) as store:
        store.append(StoredRows(rows.ids[order], rows.rows, None))
    by_id = {int(each): row for each, row in zip(rows.ids[order], rows.rows, strict=True)}
    return GradientStore.open(root), by_id


@pytest.mark.parametrize("open_for_writing", [True, False])
def test_rows_are_found_by_their_ids(tmp_path, open_for_writing):
    store, by_id = shuffled(tmp_path / "g")
    if open_for_writing:
        store = GradientStore.resume(tmp_path / "g", FakeEngine())
        added = batch(100, 102)
        store.append(added)
        by_id |= dict(zip(added.ids.tolist(), added.rows, strict=True))
    asked = [*by_id][::-2] + [*by_id][3:5]
    ordinals = store.ordinals(asked)
    assert store.ids[ordinals].tolist() == asked
    assert torch.equal(store.rows_by_id(asked), torch.stack([by_id[each] for each in asked]))
    store.close()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_ids_come_as_whatever_batches_take(tmp_path, kind):
    store, by_id = shuffled(tmp_path / "g")
    asked = [*by_id][:3]
    assert torch.equal(store.rows_by_id(kind(asked)), torch.stack([by_id[each] for each in asked]))
    assert store.rows_by_id([]).shape == (0, 6)
    with pytest.raises(CaptureError, match="one integer per sample"):
        store.rows_by_id([1.5])


def test_samples_without_one_row_are_named(tmp_path):
    store = make(tmp_path / "g", 5, duplicates="replace")
    with pytest.raises(StoreError, match="no row of samples 2, 99 is stored") as caught:
        store.rows_by_id([1, 2, 4, 99])
    assert caught.value.remedy
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        store.append(batch(1, 2))
        with pytest.raises(StoreError, match="several rows of sample 4 are stored"):
            store.ordinals([1, 4])
        fill(store, 9)
        assert store.ordinals([1]).tolist() == [0]


def test_an_empty_store_has_no_sample(tmp_path):
    store = make(tmp_path / "g", 0)
    assert store.ordinals([]).tolist() == []
    with pytest.raises(StoreError, match=r"no row of sample .* is stored"):
        store.ordinals([0])
