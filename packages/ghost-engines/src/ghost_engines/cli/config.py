"""Options of a command from a file of YAML, under those that are given in the shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
    from ghost_core import UnknownOptionError
    from ghost_engines.cli.errors import CommandError
    from ghost_engines.extras import read_yaml

    given = read_yaml(path, "--config", f"--config: {path}", CommandError)
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
        kinds = get_args(hints[name]) if get_origin(hints[name]) is UnionType else (hints[name],)
        try:
            found[name] = None if value is None and NoneType in kinds else _value(value, kinds[0])
        except ValueError as error:
            raise CommandError(f"--config: {name} in {path} is {value!r}{error}") from error
    return found


def _value(value: Any, kind: Any) -> Any:
    """Return what a file says as a value of the type that an option has.

    Raises:
        ValueError: If it is none; it says what would be one.
    """
    several = isinstance(value, Mapping | list)
    if get_origin(kind) is tuple:
        if isinstance(value, Mapping):
            return tuple(f"{key}={_text(each)}" for key, each in value.items())
        return tuple(map(_text, value if several else [value]))
    if kind in (int, bool):
        if type(value) is not kind:
            raise ValueError(", and should be " + ("true or false" if kind is bool else "whole"))
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"; there are {', '.join(get_args(kind))}")
        return value
    if kind is str and isinstance(value, list):
        return ",".join(map(_text, value))
    return kind(_text(value))


def _text(value: Any) -> str:
    """Return one value as the shell would give it.

    Raises:
        ValueError: If it is none, or several.
    """
    if value is None or isinstance(value, bool | Mapping | list):
        raise ValueError(", and should be one value")
    return str(value)
