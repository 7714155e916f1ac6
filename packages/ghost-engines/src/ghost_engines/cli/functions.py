"""Finds and calls what a user named as `module:function`."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ghost_core import GhostError
from ghost_core.errors import told
from ghost_engines.cli.errors import CommandError

logger = logging.getLogger(__name__)


@contextmanager
def _importable_from_here(name: str) -> Iterator[None]:
    """Let a module that lies in the current directory be imported, with what it imports.

    The directory is on the path for this one import only, and for no other module's: what happens
    to lie beside a checkpoint that somebody downloaded must not be imported by anybody.
    """
    before = list(sys.path)
    importlib.invalidate_caches()
    here = str(Path.cwd())
    if PathFinder.find_spec(name.partition(".")[0], [here]) is not None:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path[:] = before


def find_function(text: str, option: str) -> Callable[..., Any]:
    """Import what an option names.

    Args:
        text: `module:function`, both possibly dotted.
        option: The option, for errors.

    Returns:
        The function; exceptions that it raises become errors of one line.

    Raises:
        CommandError: If there is no such module or function, or it cannot be imported.
    """
    name, _, path = text.partition(":")
    if not all(part.isidentifier() for part in [*name.split("."), *path.split(".")]):
        raise CommandError(f"{option}: {text!r} is not of the form module:function")
    try:
        with _importable_from_here(name):
            module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise CommandError(
                f"{option}: there is no module {missing!r}, neither in the current directory nor "
                "among the installed ones"
            ) from error
        raise CommandError(f"{option}: {raised(f'importing {name}', error)}") from error
    try:
        function = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise CommandError(f"{option}: {name} has no {path!r}") from error
    except Exception as error:
        raise CommandError(f"{option}: {raised(f'looking for {text}', error)}") from error
    if not callable(function):
        raise CommandError(
            f"{option}: {text} is no function, but of type {type(function).__name__}"
        )
    return reporting(function, f"{option}: {text}")


def reporting(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Let a function's exceptions, other than those of ghost, become errors of one line.

    Args:
        function: The function.
        what: What it is, for the error.
    """

    def called(*args: Any) -> Any:
        try:
            return function(*args)
        except (GhostError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise CommandError(raised(what, error)) from error

    return called


@contextmanager
def in_one_line(what: str, *passed: type[Exception]) -> Iterator[None]:
    """Let exceptions inside become errors of one line: of torch, of the model, or of the data.

    Args:
        what: What is done inside, for the error.
        passed: Exceptions that stay what they are, beside those of ghost.
    """
    stay: tuple[type[Exception], ...] = (GhostError, *passed)
    try:
        yield
    except stay:
        raise
    except Exception as error:
        logger.debug("%s failed", what, exc_info=True)
        raise CommandError(raised(what, error)) from error


def raised(what: str, error: BaseException) -> str:
    """Say what something raised."""
    return f"{what} raised {told(error)}"
