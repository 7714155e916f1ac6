"""Lets calls of modules pass while a sampler runs them: no hook of ghost's looks at these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from ghost_core._torch import foreign_modes_left, only_own_modes

_Result = TypeVar("_Result")

_SILENT: ContextVar[frozenset[object]] = ContextVar("silent", default=frozenset())
"""Batches for which a sampler runs modules in this context, which a thread of its own may share.

An interrupt may leave one here, which then is over.
"""


class _Silence:
    """Silence for a batch: entered for each call of a module, so that it is no generator."""

    def __init__(self, silence: object) -> None:
        self._silence = silence

    def __enter__(self) -> None:
        self._before = _SILENT.get()
        _SILENT.set(self._before | {self._silence})

    def __exit__(self, *_: object) -> None:
        _SILENT.set(self._before)


@contextmanager
def _without_foreign_modes(silence: _Silence) -> Iterator[None]:
    with silence, foreign_modes_left():
        yield


def silent(silence: object) -> AbstractContextManager[None]:
    """Let calls pass for a while in this context, outside of foreign modes.

    Args:
        silence: What stands for the batch that they are let pass in.
    """
    entered = _Silence(silence)
    return entered if only_own_modes() else _without_foreign_modes(entered)


def silently(silence: object, function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function as inside of `silent`; it is done for each call of a module."""
    if not only_own_modes():
        with silent(silence):
            return function(*args)
    before = _SILENT.get()
    try:
        _SILENT.set(before | {silence})
        return function(*args)
    finally:
        _SILENT.set(before)


def is_silent(silence: object) -> bool:
    """Tell whether calls pass in this context, for the batch that something stands for."""
    return silence in _SILENT.get()
