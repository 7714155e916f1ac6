"""Restores what was changed for a while, also where an interrupt comes at the worst moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def restored() -> Iterator[ExitStack]:
    """Yield a stack of what is to be restored, and empty it afterwards.

    Ctrl-C can come between any two lines, also at the first line of a `finally`, whose others then
    do not run, or where a `with` ends, whose context is then not left. So the stack is closed
    twice: the second time does what an interrupt kept the first from. And a generator such as this
    is closed with the frame that ran it, so that a `with restored()` may be interrupted where it
    ends; modes of torch, and whatever else is no generator, are entered on the stack.

    What is put on it goes there before what it takes back is changed.
    """
    stack = ExitStack()
    try:
        try:
            yield stack
        finally:
            stack.close()
    finally:
        stack.close()


class Leave(property):
    """The `__exit__` of an object that has another context do it, found by `operator.attrgetter`.

    A with statement looks it up before it enters, so that no line of ghost's, at which an interrupt
    could come, runs before what it leaves is left.
    """

    def __call__(self, owner: Any, *exception: Any) -> Any:
        """Leave: `ExitStack` asks the class, and calls what it finds with the object."""
        return self.__get__(owner)(*exception)


def undo(stack: ExitStack, function: Callable[..., object], *args: object) -> None:
    """Have a stack undo something: twice, since an interrupt may end the first."""
    stack.callback(function, *args)
    stack.callback(function, *args)


@contextmanager
def undone(function: Callable[..., object], *args: object) -> Iterator[None]:
    """Undo something afterwards, as `restored` does that is given one function to `undo`."""
    try:
        try:
            yield
        finally:
            function(*args)
    finally:
        function(*args)


@contextmanager
def graphs_kept(kept: bool) -> Iterator[None]:
    """Let autograd build graphs inside, or not.

    `torch.no_grad()` in a with statement stays on where Ctrl-C comes as the block ends.
    """
    with undone(torch.set_grad_enabled, torch.is_grad_enabled()):
        torch.set_grad_enabled(kept)
        yield
