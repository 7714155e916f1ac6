"""Disks that fail: at one call of the system or from one on, and where a file may not grow."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class Failing:
    """Makes the n-th call of one function of `os` fail, and all later ones while `broken`.

    A write that fails has written half of what it was given, as one that runs into a full disk.
    """

    name: str
    at: int
    calls: int = 0
    broken: bool = True
    number: int = errno.ENOSPC
    lasts: bool = True

    def replacement(self) -> Callable[..., Any]:
        real = getattr(os, self.name)

        def call(*arguments: Any, **named: Any) -> Any:
            if self.name == "open" and reads(*arguments):
                return real(*arguments, **named)
            self.calls += 1
            if self.broken and (self.calls == self.at + 1 or (self.lasts and self.calls > self.at)):
                if self.name == "write":
                    descriptor, data = arguments
                    real(descriptor, data[: len(data) // 2])
                raise OSError(self.number, os.strerror(self.number))
            return real(*arguments, **named)

        return call


def reads(path: Any, flags: int, mode: int = 0) -> bool:
    """Return whether a file is opened to be read, which no write does."""
    return not flags & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(path)


@contextmanager
def failing(name: str, at: int, **given: Any) -> Iterator[Failing]:
    state = Failing(name, at, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, state.replacement())
        yield state


@contextmanager
def short_of_room(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size; what is written up to there is there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
