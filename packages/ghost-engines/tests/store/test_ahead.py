"""Blocks that are read in another thread while the ones before are compared."""

import threading

import pytest
import torch
from store_kit import FakeEngine, batch, make

from ghost_engines.store import GradientStore, StoreError
from ghost_engines.store.ahead import ahead


def numbers(n, closed):
    try:
        for number in range(n):
            yield None if number == 1 else number  # nothing is an item as well
        raise ZeroDivisionError
    finally:
        closed.append(threading.current_thread())


def readers():
    return [each for each in threading.enumerate() if each.name.startswith("ghost reader")]


def test_items_come_in_order_and_an_error_after_them():
    closed, found = [], []
    with pytest.raises(ZeroDivisionError):
        found.extend(ahead(numbers(3, closed)))
    items = ahead(numbers(4, closed))
    assert [next(items) for _ in range(4)] == [0, None, 2, 3]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert closed[0] is not threading.main_thread()
    assert readers() == []


def test_who_leaves_early_leaves_neither_a_thread_nor_an_open_file():
    closed = []
    items = ahead(numbers(9, closed))
    assert next(items) == 0
    items.close()
    assert len(closed) == 1
    assert readers() == []


def test_a_search_that_breaks_off_stops_reading(tmp_path):
    store = make(tmp_path, 40)
    huge = batch(0, 1).rows * 1e36
    with pytest.raises(StoreError, match="overflow"):
        store.search(huge, k=2)
    assert readers() == []


@pytest.mark.parametrize("replaced", [[], [2, 3], list(range(8)), list(range(8, 14))])
def test_scanned_rows_stay_until_the_next_but_one(tmp_path, replaced):
    with GradientStore.create(tmp_path, FakeEngine(), unit=8, duplicates="replace") as store:
        store.append(batch(0, 20))
        store.append(batch(0, 20)[torch.tensor(replaced, dtype=torch.int64)])
    kept, before = [at for at in range(20) if at not in replaced] + replaced, None
    for block in GradientStore.open(tmp_path).scan(2):
        expected, kept = batch(0, 20)[torch.tensor(kept[: len(block)])], kept[len(block) :]
        for found, wanted in filter(None, [before, (block, expected)]):
            assert torch.equal(found.ids, wanted.ids)
            assert torch.equal(found.rows, wanted.rows)
        before = block, expected
    assert kept == []
