"""The rows that a writer keeps in memory."""

import pytest
import torch
from store_kit import batch

from ghost_engines.store.tail import Tail


def kept(tail: Tail, start: int, stop: int) -> bool:
    expected = batch(start, stop)
    return torch.equal(tail.rows.rows, expected.rows) and torch.equal(tail.rows.ids, expected.ids)


def assert_kept(tails: list[tuple[Tail, int]]) -> None:
    """Assert that tails hold their rows: one that counts, and one that replaces it."""
    for tail, first in tails:
        assert not tail.length or kept(tail, first, first + tail.length)


@pytest.mark.parametrize("step", [1, 3, 4, 7, 30])
def test_every_tail_keeps_its_rows_whatever_becomes_of_later_ones(step):
    """An interrupt may leave any of them to be the one that counts."""
    unit, tails = 8, [(Tail(0), 0)]
    n = 0
    while n < 90:
        tail, first = tails[-1]
        tail = tail.with_rows(batch(n, n + step), unit)
        assert not tail.settled
        n += step
        tails.append((tail, first))
        while tail.length >= unit:
            assert_kept(tails[-2:])
            head, tail = tail.split(unit)
            assert torch.equal(head.rows, batch(first, first + unit).rows)
            first += unit
            tails.append((tail, first))
        assert_kept(tails[-2:])
    assert len(tails) > 5


def test_many_small_batches_are_not_copied_again_and_again(monkeypatch):
    monkeypatch.setattr("ghost_engines.store.tail._ROOM", 0)
    tail, memories = Tail(0), set()
    for n in range(3000):
        tail = tail.with_rows(batch(n, n + 1), 4096)
        memories.add(tail.memory.rows.data_ptr())
        assert len(tail.memory) <= 4097
    assert kept(tail, 0, 3000)
    assert len(memories) <= 12


def test_rows_that_are_appended_in_inference_mode_can_be_followed_by_others():
    with torch.inference_mode():
        tail = Tail(0).with_rows(batch(0, 2), 8)
    assert kept(tail.with_rows(batch(2, 4), 8), 0, 4)
