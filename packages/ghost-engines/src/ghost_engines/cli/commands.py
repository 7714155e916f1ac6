"""Reads the command line and runs what it names.

Nothing here imports torch, which takes seconds: what a command does is imported when it runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import tyro

from ghost_engines.cli.options import Plugins, Score, Store, Verify
from ghost_engines.cli.tables import one_line, open_streams, stop_printing
from ghost_engines.versions import version

Options = Verify | Score | Plugins | Store

_app = tyro.extras.SubcommandApp()
_app.command(name="verify")(Verify)
_app.command(name="score")(Score)
_app.command(name="plugins")(Plugins)
_app.command(name="store")(Store)


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
        return _failed(error, 2)


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
    options: Options = _app.cli(
        prog="ghost",
        description="Per-sample gradients for PyTorch. `ghost --version` prints the version.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return _run(options)


def _run(options: Options) -> int:
    match options:
        case Verify():
            from ghost_engines.cli.verify import verify

            return verify(options)
        case Score():
            from ghost_engines.cli.score import score

            return score(options)
        case Plugins():
            from ghost_engines.cli.plugins import show

            return show()
        case Store(path, verify=verified):
            from ghost_engines.cli.store import describe

            return describe(path, verify=verified)


def _failed(what: object, status: int) -> int:
    """Say what went wrong, in one line, and return the exit status."""
    print(f"ghost: {one_line(what)}", file=sys.stderr)
    return status
