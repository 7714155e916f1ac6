"""Writers that are interrupted before any line of the store's code, and go on."""

from contextlib import suppress

import pytest
import torch
from interrupt_kit import EVERYWHERE, attempts
from kill_kit import TOTAL, UNIT, FakeEngine, append, assert_holds_exactly, batch, leftovers
from search_kit import best_of, stored

from ghost_engines.store import GradientStore, StoreError
from ghost_engines.store.half_sieve import HalfSieve
from ghost_engines.store.sieve import Sieve


def strides(*small):
    return [*small, pytest.param(1, marks=pytest.mark.stress)]


@pytest.mark.parametrize("stride", strides(43))
@pytest.mark.parametrize(("first", "stop"), [(5, 9), (14, 36), (0, UNIT)])
def test_an_append_can_be_repeated(tmp_path, stride, first, stop):
    """Whichever line it was interrupted at, its rows are there once, or it says so."""
    refused = interrupted = 0
    for interrupt in attempts(stride):
        root = tmp_path / f"{interrupt.at}"
        with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
            append(store, first)
            try:
                with interrupt:
                    append(store, stop)
            except KeyboardInterrupt:
                interrupted += 1
                if len(store) == first:
                    append_from(store, first, stop)
                else:
                    refused += 1
                    with pytest.raises(StoreError, match="do not append them again"):
                        append_from(store, first, stop)
                    store.commit()
                assert len(store) == stop
            append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        assert leftovers(root) == []
    assert refused < interrupted


def append_from(store, start, stop):
    """Append the same rows again, whatever is in the store."""
    rows = batch(start, stop)
    store.append(rows, loss=rows.loss)


@pytest.mark.parametrize("stride", strides(37))
def test_a_commit_can_be_repeated(tmp_path, stride):
    for interrupt in attempts(stride):
        root = tmp_path / f"{interrupt.at}"
        with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
            append(store, 5)
            try:
                with interrupt:
                    store.commit()
            except KeyboardInterrupt:
                assert len(store) == 5
                store.commit()
            assert_holds_exactly(GradientStore.open(root), 5)
            append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(root), TOTAL)


@pytest.mark.parametrize("stride", strides(37))
def test_an_interrupt_while_a_store_is_closed_loses_nothing_acknowledged(tmp_path, stride):
    for interrupt in attempts(stride):
        root = tmp_path / f"{interrupt.at}"
        store = GradientStore.create(root, FakeEngine(), unit=UNIT)
        append(store, 20)
        try:
            with interrupt:
                store.close()
        except KeyboardInterrupt:
            store.close()
        store = GradientStore.resume(root, FakeEngine())
        assert len(store) in (UNIT, 20)
        with store:
            append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(root), TOTAL)


@pytest.mark.parametrize("stride", strides(61))
@pytest.mark.parametrize("how", ["create", "resume", "join"])
def test_a_store_that_was_not_opened_can_be_opened(tmp_path, stride, how):
    for interrupt in attempts(stride):
        root = tmp_path / f"{interrupt.at}"
        made = 0
        if how == "resume":
            made = 20
            with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
                append(store, made)
        store = None
        try:
            with interrupt:
                if how == "create":
                    store = GradientStore.create(root, FakeEngine(), unit=UNIT)
                elif how == "join":
                    store = GradientStore.join(root, FakeEngine(), part="a", unit=UNIT)
                else:
                    store = GradientStore.resume(root, FakeEngine())
        except KeyboardInterrupt:
            pass
        if store is None and how == "join":
            store = GradientStore.join(root, FakeEngine(), part="a", unit=UNIT)
        if store is None:
            there = (root / "manifest.json").exists()
            store = (
                GradientStore.resume(root, FakeEngine())
                if there
                else GradientStore.create(root, FakeEngine(), unit=UNIT)
            )
        with store:
            assert len(store) == made
            append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(root), TOTAL)


@pytest.mark.parametrize("stride", strides(61))
def test_an_interrupted_reader_can_read_on(tmp_path, stride):
    root = tmp_path / "g"
    with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
        append(store, TOTAL)
    store = GradientStore.open(root)
    for interrupt in attempts(stride):
        try:
            with interrupt:
                store.rows()
                store.search(store.rows(0, 2), k=3)
        except KeyboardInterrupt:
            pass
        assert_holds_exactly(store, TOTAL)


@pytest.mark.parametrize("stride", strides(67))
@pytest.mark.parametrize("held", [False, True])
def test_an_interrupted_search_with_a_sieve_can_be_repeated(tmp_path, monkeypatch, held, stride):
    """What it found so far, and the room that it works in, are of that search alone."""
    monkeypatch.setattr(Sieve, "pays", staticmethod(lambda *_, **known: not held))
    monkeypatch.setattr(HalfSieve, "pays", staticmethod(lambda *_: True))
    torch.manual_seed(0)
    store = stored(tmp_path, torch.randn(900, 16).half(), unit=250)
    if held:
        store = held_in_spite_of_interrupts(store, stride)
    queries = torch.randn(5, 16)
    before = store.search(queries, k=3, block=256)
    expected = best_of(queries.double() @ store.rows().double().T, 3)
    assert torch.equal(before.ordinals, expected)
    found = precision()
    for interrupt in attempts(stride, EVERYWHERE):
        with suppress(KeyboardInterrupt), interrupt:
            store.search(queries, k=3, block=256)
        assert precision() == found
        again = store.search(queries, k=3, block=256)
        assert torch.equal(again.ordinals, expected)
        assert torch.equal(again.scores, before.scores)


def held_in_spite_of_interrupts(store, stride):
    """Interrupt the reading, and return what is held in the end."""
    for interrupt in attempts(5 * stride, EVERYWHERE):
        with suppress(KeyboardInterrupt), interrupt:
            found = store.held(progress=False)
        assert store.held_rows is None
    return found


def precision():
    """Return what a search sets in the whole process for a while."""
    products = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    return torch.get_float32_matmul_precision(), getattr(products, "fp32_precision", None)
