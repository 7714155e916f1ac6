"""Settings of the process, while several threads need them otherwise."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from ghost_core.algebra import full_precision
from ghost_core.process import (
    eagerly,
    exact_products,
    parametrizations_computed,
    replayable,
    without_cudnn,
)
from ghost_core.switches import Switch, Switches

PATIENCE = 60
"""Seconds until a test that hangs fails."""


class Setting:
    """A setting of the process."""

    def __init__(self, value: str) -> None:
        self.value = value

    def switch(self, needed: str) -> Switch:
        return Switch(lambda: self.value, lambda value: setattr(self, "value", value), needed)


def overlapping(enter: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter in two threads, of which the first to come is the first to go."""
    step, failed = Barrier(2, timeout=PATIENCE), []

    def run(late: bool) -> None:
        try:
            if late:
                step.wait()  # the first is inside
            with enter():
                if not late:
                    step.wait()
                step.wait()  # both are inside
                if late:
                    step.wait()  # the first has left
            if not late:
                step.wait()
        except BaseException as error:
            failed.append(error)
            step.abort()

    threads = [Thread(target=run, args=(late,)) for late in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def for_products() -> AbstractContextManager[None]:
    return full_precision(torch.device("cpu"))


def settings() -> dict[str, object]:
    """Return all that ghost sets in the process for a while."""
    backends = torch.backends
    found: dict[str, object] = {
        "matmul": torch.get_float32_matmul_precision(),
        "cuDNN": backends.cudnn.enabled,
        "attention": backends.mha.get_fastpath_enabled(),
        "warnings": list(warnings.filters),
        "parametrizations": parametrize._cache_enabled,
    }
    found["float32"] = [owner.fp32_precision for owner in owners()]
    return found


def owners() -> list[Any]:
    """Return what has a setting of its own for float32 products, from torch 2.9 on."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return []
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@pytest.fixture
def fast_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    each = [owner.fp32_precision for owner in owners()]
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)
    for owner, precision in zip(owners(), each, strict=True):
        owner.fp32_precision = precision


@pytest.mark.usefixtures("fast_products")
@pytest.mark.parametrize(
    "enter",
    [exact_products, without_cudnn, replayable, parametrizations_computed, for_products],
)
@pytest.mark.parametrize("cached", [False, True])
def test_threads_that_overlap_leave_all_settings_as_they_were(
    enter: Callable[[], AbstractContextManager[None]], cached: bool
) -> None:
    before = settings()
    with parametrize.cached() if cached else nullcontext():
        inside = settings()
        overlapping(enter)
        assert settings() == inside
    assert settings() == before


def test_the_compiler_is_let_loose_by_the_last_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the compiler, which takes seconds to import."""
    stance = ["default"]

    @contextmanager
    def set_stance(value: str) -> Iterator[None]:
        before, stance[0] = stance[0], value
        yield
        stance[0] = before

    monkeypatch.setitem(sys.modules, "torch._dynamo", sys.modules["torch"])
    monkeypatch.setattr(torch.compiler, "set_stance", set_stance, raising=False)
    overlapping(eagerly)
    assert stance == ["default"]


def test_the_last_puts_back_and_nobody_before() -> None:
    setting = Setting("fast")
    switches = Switches(setting.switch("exact"))
    seen: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        with switches.thrown():
            seen.append(setting.value)
            yield
            seen.append(setting.value)

    overlapping(noted)
    assert seen == ["exact"] * 4
    assert setting.value == "fast"


def test_what_others_set_meanwhile_is_overruled_for_the_next_and_stays() -> None:
    setting = Setting("fast")
    switches = Switches(setting.switch("exact"))
    with switches.thrown():
        setting.value = "faster"
        with switches.thrown():
            assert setting.value == "exact"
        assert setting.value == "exact"
    assert setting.value == "faster"
    with switches.thrown():
        setting.value = "slow"
    assert setting.value == "slow"


def test_many_threads_at_once() -> None:
    setting = Setting("fast")
    switches, wrong = Switches(setting.switch("exact")), []

    def run() -> None:
        for _ in range(200):
            with switches.thrown():
                if setting.value != "exact":
                    wrong.append(setting.value)

    threads = [Thread(target=run) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert wrong == []
    assert setting.value == "fast"
