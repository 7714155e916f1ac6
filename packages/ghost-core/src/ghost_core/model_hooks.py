"""Hooks that stay on the model they were made for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

from torch import Tensor

from ghost_core._torch import compiles, gradient_hooks, uncompiled
from ghost_core.errors import CaptureError


class Hook:
    """A hook that stays behind when the model is copied or pickled.

    In its place the copy has a function of the standard library that does nothing, whatever it
    gets, so that a file loads where ghost is not installed.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Do what the hook does, out of reach of torch's compiler."""
        if compiles():
            return _run(self._function, args)
        return self._function(*args)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (nullcontext(), "__exit__")


def is_own(hook: object) -> bool:
    """Tell whether a hook is one of ghost's, or what is left of one on a copy of a model."""
    if isinstance(hook, MethodType):
        return type(hook.__self__) is nullcontext
    return isinstance(hook, Hook)


def check_unhooked(name: str, parameter: Tensor) -> None:
    """Refuse a parameter with a hook of the user's on its gradient.

    Raises:
        CaptureError: If there is one.
    """
    if not all(map(is_own, gradient_hooks(parameter).values())):
        raise CaptureError(
            f"{name} has a hook on its gradient, which contributions do not pass through: remove "
            "the hook, or leave the parameter out with exclude=..."
        )


@uncompiled
def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)
