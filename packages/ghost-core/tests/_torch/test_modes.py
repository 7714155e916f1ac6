"""What is switched off while ghost's own code runs, and is on again whatever happens there."""

import gc
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ghost_core._torch import (
    DispatchMode,
    FunctionMode,
    modes,
    uncompiled,
    unseen,
    unwatched,
    without_gradients,
)
from ghost_core.restoring import graphs_kept


class Own(FunctionMode):
    """Counts the functions that ran."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Foreign(TorchFunctionMode):
    """Another program's mode, which answers for itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return "foreign" if func is torch.neg else func(*args, **(kwargs or {}))


def fail():
    raise KeyboardInterrupt


def test_own_modes_see_nothing_of_what_is_unseen():
    with Own() as mode:
        unseen(torch.neg, torch.ones(1))
        before = mode.count  # `ones` was outside
        with pytest.raises(KeyboardInterrupt):
            unseen(fail)
        torch.neg(torch.ones(1))
    assert (before, mode.count) == (1, 3)


def test_foreign_modes_stay_on():
    with Foreign(), Own():
        assert unseen(torch.neg, torch.ones(1)) == "foreign"


class Watching(DispatchMode):
    """Counts the operations that ran."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_an_own_mode_on_top_sees_no_operation_of_what_is_unwatched():
    x = torch.ones(1)
    with Watching() as mode:
        made = unwatched(torch.neg, x)
        with pytest.raises(KeyboardInterrupt):
            unwatched(fail)
        before = mode.count
        torch.neg(x)
    assert (before, mode.count) == (0, 1)
    assert made == unwatched(torch.neg, x) == -1


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_off_for_a_while_only(enabled):
    with torch.set_grad_enabled(enabled):
        assert not without_gradients(torch.is_grad_enabled)
        with pytest.raises(KeyboardInterrupt):
            without_gradients(fail)
        assert torch.is_grad_enabled() is enabled


def test_the_compiler_reads_no_table_of_all_modules(monkeypatch):
    """It would guard every name there is in it, at each hook that it meets."""
    compiles = SimpleNamespace(
        compiler=SimpleNamespace(is_dynamo_compiling=lambda: True),
        _dynamo=SimpleNamespace(disable=lambda function: lambda *_: "left alone"),
    )
    monkeypatch.setattr(modes, "torch", compiles)
    monkeypatch.setattr(modes, "sys", SimpleNamespace())
    assert uncompiled(abs)(-1) == "left alone"


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_graphs_are_kept_as_before_wherever_an_interrupt_comes(kept, before):
    with torch.set_grad_enabled(before):
        at = 0
        while interrupted(kept, at := at + 1):
            assert torch.is_grad_enabled() is before, at
    assert at > 10


def interrupted(kept, at):
    """Interrupt before a line, of ghost's or of what it calls; tell whether that was in time."""
    lines = count(1)

    def line(frame, event, argument):
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return line

    def use():
        with graphs_kept(kept):
            assert torch.is_grad_enabled() is kept

    gc.disable()  # others' callbacks run when it collects, and what they raise is lost
    sys.settrace(lambda frame, event, argument: line)
    try:
        use()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        gc.enable()
    return False
