"""Reads the options of an example from its command line, and says what does not fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import tyro

from ghost_core import GhostError
from ghost_engines.cli import stop_printing

Asked = TypeVar("Asked")


def read_options(
    kind: type[Asked], arguments: Sequence[str] | None, *, name: str, description: str | None
) -> Asked:
    """Return the options that a command line asks for.

    Args:
        kind: A dataclass of options.
        arguments: What follows the command's name; by default what the shell gave.
        name: Name of the example, in the package.
        description: What the help begins with.

    Raises:
        SystemExit: After `--help`, quietly where its reader has seen enough, or if the arguments
            cannot be understood.
    """
    try:
        try:
            return tyro.cli(
                kind, args=arguments, prog=f"ghost_examples.{name}", description=description
            )
        finally:
            sys.stdout.flush()  # at exit, python would complain
    except BrokenPipeError:
        stop_printing()
        sys.exit(0)


@contextmanager
def refusals(*more: type[Exception]) -> Iterator[None]:
    """Print what ghost refuses instead of where it did.

    Args:
        more: Other errors that say enough by themselves.

    Raises:
        SystemExit: With 2, after that.
    """
    kinds: tuple[type[Exception], ...] = (GhostError, *more)
    try:
        yield
    except kinds as error:
        print(error, file=sys.stderr)
        sys.exit(2)
