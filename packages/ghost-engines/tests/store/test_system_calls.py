"""Each call of the system that the store makes fails once: reported, and nothing is lost."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kill_kit import TOTAL, UNIT, FakeEngine, append, assert_holds_exactly, batch, leftovers

from ghost_engines.store import GradientStore, StoreError

CALLS = (
    *("open", "read", "pread", "preadv", "write", "fsync", "close"),
    *("stat", "fstat", "scandir", "mkdir", "replace", "unlink"),
)

QUICK = ("pread", "scandir")


class Once:
    """Makes the n-th call of a function of `os` fail. What closes, closes nevertheless."""

    def __init__(self, name: str, at: int) -> None:
        self.name, self.at, self.calls = name, at, 0
        self.real = getattr(os, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return self.real(*arguments, **named)
        if self.name == "close":
            self.real(*arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextmanager
def failing(name: str, at: int) -> Iterator[Once]:
    once = Once(name, at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, once)
        yield once


def names():
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.stress) for name in CALLS
    ]


def attempts(name: str, act: Callable[[int], Once]) -> int:
    """Act with a failure of later and later calls, until one comes too late; return how many."""
    for at in range(1, 10_000):
        if act(at).calls < at:
            return at - 1
    raise AssertionError("it never came to its end")


def write(root: Path) -> None:
    """Write on from wherever a store is, committing now and then."""
    if (root / "manifest.json").exists():
        store = GradientStore.resume(root, FakeEngine())
    else:
        store = GradientStore.create(root, FakeEngine(), unit=UNIT)
    with store:
        for stop in (5, 14, 36, 38, TOTAL):
            if len(store) < stop:
                append(store, stop)
                store.commit()


@pytest.mark.parametrize("name", names())
def test_a_writer_that_starts_anew_after_a_failed_call_loses_and_doubles_nothing(tmp_path, name):
    def act(at: int) -> Once:
        root = tmp_path / f"{at}"
        failed = False
        with failing(name, at) as once:
            try:
                write(root)
            except (OSError, StoreError):
                failed = True
        if not failed:  # it came too late, or it did not matter
            assert_holds_exactly(GradientStore.open(root), TOTAL)
        if (root / "manifest.json").exists():
            left = GradientStore.open(root)
            assert_holds_exactly(left, len(left))
        write(root)
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        assert leftovers(root) == []
        return once

    assert attempts(name, act) > 0 or name in ("preadv", "read", "unlink")


@pytest.mark.parametrize("name", names())
def test_a_writer_that_goes_on_after_a_failed_call_loses_and_doubles_nothing(tmp_path, name):
    def act(at: int) -> Once:
        root = tmp_path / f"{at}"
        with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
            append(store, 3)
            store.commit()
            with failing(name, at) as once:
                for stop in (5, 14, 36, 38):
                    while len(store) < stop:
                        start = len(store)
                        try:
                            append(store, stop)
                        except (OSError, StoreError):
                            assert len(store) in (start, stop)
                            if len(store) == stop:
                                with pytest.raises(StoreError, match="do not append them again"):
                                    again(store, start, stop)
                                store.commit()
                    try:
                        store.commit()
                    except (OSError, StoreError):
                        store.commit()
                    assert store.committed == stop
            assert_holds_exactly(GradientStore.open(root), 38)
            append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        assert leftovers(root) == []
        return once

    attempts(name, act)


def again(store: GradientStore, start: int, stop: int) -> None:
    rows = batch(start, stop)
    store.append(rows, loss=rows.loss)


@pytest.mark.parametrize("name", names())
def test_a_reader_reports_a_failed_call_and_reads_on(tmp_path, name):
    root = tmp_path / "g"
    write(root)

    def act(at: int) -> Once:
        failed = False
        with failing(name, at) as once:
            try:
                store = GradientStore.open(root)
                assert_holds_exactly(store, TOTAL)
                store.search(batch(0, 2).rows, k=3)
            except (OSError, StoreError):
                failed = True
        assert failed or once.calls < at or name == "close"
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        return once

    attempts(name, act)
