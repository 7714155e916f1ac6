"""Hooks that stay on the model they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook that stays behind when the model is copied or pickled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Do what the hook does."""
        return self._function(*args)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _ignore

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _get_ignore, ()


def _ignore(*_: object) -> None:
    """Stand in for a hook on a copy of the model."""


def _get_ignore() -> Callable[..., None]:
    return _ignore
