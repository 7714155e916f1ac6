"""Options of a command from a file of YAML, under those that are given in the shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

OptionsT = TypeVar("OptionsT")


def config_of(arguments: Sequence[str]) -> Path | None:
    """Return the file that `--config` names, if it does."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            if equals:
                return Path(value)
            return Path(arguments[at + 1]) if at + 1 < len(arguments) else None
    return None


def defaults_from(path: Path, kind: type[OptionsT]) -> OptionsT:
    """Return options with what a file says, to be filled up by the shell.

    Args:
        path: The file.
        kind: The dataclass of the options.

    Raises:
        CommandError: If it is no YAML, or a value is of another type.
        MissingExtraError: If pyyaml is not installed.
        UnknownOptionError: If there is no such option.
        OSError: If it cannot be read.
    """
    from ghost_core import MissingExtraError, UnknownOptionError
    from ghost_engines.cli.errors import CommandError

    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("pyyaml", "ghost-engines[yaml]", "--config") from error
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise CommandError(f"--config: {path} is no YAML: {error}") from error
    if not isinstance(given, Mapping):
        raise CommandError(f"--config: {path} has no options by name")
    known = {entry.name: entry for entry in fields(kind) if entry.name != "config"}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for written, value in given.items():
        name = str(written).replace("-", "_")
        if name not in known:
            raise UnknownOptionError(f"option in {path}", str(written), known)
        values[name] = value
    checked = _parsed(kind, values, path)
    for name, entry in known.items():
        if name not in checked and entry.default is MISSING:
            checked[name] = tyro.MISSING
    return kind(**checked)


def _parsed(kind: type[Any], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return values of the types that options have."""
    from ghost_engines.cli.errors import CommandError

    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for name, value in values.items():
        wanted = str(hints[name])
        if isinstance(value, Mapping):
            found[name] = tuple(f"{key}={each}" for key, each in value.items())
        elif isinstance(value, list):
            found[name] = tuple(map(str, value)) if "tuple" in wanted else ",".join(map(str, value))
        elif isinstance(value, bool) or "int" in wanted:
            fits = isinstance(value, bool) == (hints[name] is bool) and isinstance(value, int)
            if not fits and value is not None:
                raise CommandError(f"--config: {name} in {path} is {value!r}")
            found[name] = value
        elif "Path" in wanted and value is not None:
            found[name] = Path(str(value))
        else:
            found[name] = None if value is None else str(value)
    return found
