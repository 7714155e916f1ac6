"""Reads the command line and runs what it names.

Nothing here imports torch, which takes seconds, unless there are plugins of others: what a command
does is imported when it runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import tyro

from ghost_engines.cli.config import config_of, defaults_from, takes_config
from ghost_engines.cli.folder_options import STORE, Store
from ghost_engines.cli.options import COMMANDS
from ghost_engines.cli.own import Configured
from ghost_engines.cli.tables import one_line, open_streams, print_error, stop_printing
from ghost_engines.versions import version

_OWN = {"ghost_core", "ghost_layers", "ghost_engines", "ghost_examples"}
"""Packages whose plugins have no other commands than those in `COMMANDS`."""


_ABOUT = (
    "Per-sample gradients for PyTorch. `ghost --version` prints the version. Every command exits "
    "with 130 if it is interrupted. Every command with options, a plugin's too, reads them from a "
    "file of YAML with --config FILE."
)

_PARSER = (tyro.conf.FlagCreatePairsOff,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default what the shell gave.

    Returns:
        The exit status: 0; 1 if a check found damage, or gradients that are not exact; 2 if the
        command could not do its work; 130 if it was interrupted.

    Raises:
        SystemExit: After `--help`, or if the arguments cannot be understood.
    """
    open_streams()
    try:
        try:
            return _answered(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            _flush()
    except BrokenPipeError:
        try:
            sys.stderr.flush()
        except OSError:  # of arguments that are not understood: nobody reads why
            stop_printing(sys.stderr)
            return 2
        stop_printing()
        return 0
    except KeyboardInterrupt:
        return _failed("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        return _failed(error, 2)
    except Exception as error:
        from ghost_core import GhostError  # which has been imported by what raised one

        if not isinstance(error, GhostError):
            raise
        from ghost_engines.cli.remedies import in_shell

        return _failed(in_shell(error), 2)


def _flush() -> None:
    """Write what was printed, also after `--help`: at exit, nobody could say that it failed."""
    try:
        sys.stdout.flush()
    except OSError:
        stop_printing()
        raise


def _answered(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"ghost {version('ghost-engines')}")
        return 0
    commands = _commands()
    options = _told(commands, arguments)
    if type(options) in COMMANDS.values():
        status: int = options.run()
        return status
    from ghost_engines.cli.foreign import run

    return run(options, next(name for name in commands if commands[name] is type(options)))


def _told(commands: Mapping[str, type[Any]], arguments: Sequence[str]) -> Any:
    """Return the command that is named, with its options."""
    if arguments and (kind := commands.get(arguments[0])) is not None:
        name, *rest = arguments
        if kind is Store and rest and rest[0] in STORE:
            return Store(_parsed(STORE[rest[0]], f"{name} {rest[0]}", rest[1:]))
        return _parsed(kind, name, rest)
    app = tyro.extras.SubcommandApp()
    for name, kind in commands.items():
        app.command(name=name)(kind)
    return app.cli(prog="ghost", description=_ABOUT, args=arguments, config=_PARSER)


def _parsed(kind: Any, name: str, arguments: Sequence[str]) -> Any:
    """Return one command with its options, parsed alone, so that an error names its help."""
    given: dict[str, Any] = {}
    path, others = config_of(arguments)
    if path is not None and takes_config(kind):
        given["default"] = defaults_from(path, kind)
        arguments = arguments if issubclass(kind, Configured) else others
    return tyro.cli(kind, prog=f"ghost {name}", args=arguments, config=_PARSER, **given)


def _commands() -> Mapping[str, type[Any]]:
    """Return all commands by name; plugins are asked only if there are any but ghost's own."""
    try:
        modules = {entry.module.partition(".")[0] for entry in entry_points(group="ghost")}
    except Exception:  # any package's metadata may be broken; discovery passes over these
        modules = {""}
    if modules <= _OWN:
        return COMMANDS
    from ghost_engines.cli.foreign import readable

    return readable()


def _failed(what: object, status: int) -> int:
    """Say what went wrong, in one line, and return the exit status."""
    print_error(one_line(what))
    return status
