"""Commands that plugins of others offer: which can be read, and what they did."""

from __future__ import annotations

import io
from contextlib import redirect_stdout, suppress
from typing import Any

import tyro

from ghost_core import Command, GhostError
from ghost_core.errors import told
from ghost_core.plugins import installed
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.options import COMMANDS
from ghost_engines.cli.tables import one_line, print_error


def readable() -> dict[str, type[Any]]:
    """Return all commands by name, without those of which no options can be read.

    One line says so of each: it must not keep the others from working.
    """
    found: dict[str, type[Any]] = {}
    for name, kind in installed().commands.items():
        try:
            _check(kind)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # its own classes are looked into
            what = f"{_called(name)} cannot be read: {told(error)}"
            print_error(one_line(what))
        else:
            found[name] = kind
    return found


def _check(kind: type[Any]) -> None:
    """Let the help of a command be made, as `--help` would, and throw it away."""
    if kind not in COMMANDS.values():
        with suppress(SystemExit), redirect_stdout(io.StringIO()):
            tyro.cli(kind, args=["--help"])


def run(command: Command, name: str) -> int:
    """Run a command of a plugin, and return its exit status.

    Args:
        command: The command with what it was told.
        name: Its name.

    Raises:
        CommandError: If it fails, in any way, or returns no exit status.
    """
    try:
        status = command.run()
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except BaseException as error:
        said = str(error) if isinstance(error, GhostError) else told(error)
        raise CommandError(f"{_called(name)}: {said}") from error
    if type(status) is not int or not 0 <= status < 256:
        raise CommandError(
            f"{_called(name)}: its run() returned {status!r}, which is no exit status from 0 to 255"
        )
    return status


def _called(name: str) -> str:
    return f"the command {name} of the plugin {installed().owner('command', name)}"
