"""Options of a command from a file of YAML, under those that are given in the shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from ghost_engines.cli.own import Configured, Own

OptionsT = TypeVar("OptionsT")

_SEVERAL = (tuple, list, set, frozenset, Sequence)


def takes_config(kind: type[Any]) -> bool:
    """Tell whether the options of a command may be in a file.

    Those of a plugin's may if it is a dataclass, unless it has an option of that name itself.
    """
    if issubclass(kind, Configured):
        return True
    foreign = is_dataclass(kind) and not issubclass(kind, Own)
    return foreign and "config" not in (each.name for each in fields(kind))


def config_of(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file that `--config` names, if it does, and all other arguments."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            end = at + 1 if equals else at + 2
            given = [value] if equals else list(arguments[at + 1 : end])
            rest = [*arguments[:at], *arguments[end:]]
            return (Path(given[0]) if given else None), rest
    return None, list(arguments)


def defaults_from(path: Path, kind: type[OptionsT]) -> OptionsT:
    """Return options with what a file says, to be filled up by the shell.

    Args:
        path: The file.
        kind: The dataclass of the options.

    Raises:
        CommandError: If it cannot be read or is no YAML, or a value is of another type.
        MissingExtraError: If pyyaml is not installed.
        UnknownOptionError: If there is no such option.
    """
    from ghost_core import UnknownOptionError
    from ghost_engines.cli.errors import CommandError
    from ghost_engines.extras import read_yaml

    try:
        given = read_yaml(path, "--config", f"--config: {path}", CommandError)
    except OSError as error:
        why = error.strerror or error
        raise CommandError(f"--config: {path} cannot be read: {why}") from error
    if not isinstance(given, Mapping):
        raise CommandError(f"--config: {path} has no options by name")
    known = [each.name for each in fields(kind) if each.init and each.name != "config"]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for written, value in given.items():
        name = str(written).replace("-", "_")
        if name not in known:
            raise UnknownOptionError(f"option in {path}", str(written), known)
        if name in values:
            raise CommandError(f"--config: {name} is there twice in {path}")
        values[name] = value
    return _options(kind, _parsed(kind, values, path))


def _options(kind: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Return options of which some may be missing, so that no code of theirs runs yet."""
    made = object.__new__(kind)
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.init:
            value = values[entry.name] if entry.name in values else _default(entry)
            object.__setattr__(made, entry.name, value)
    return made


def _default(entry: Field[Any]) -> Any:
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return tyro.MISSING if entry.default is MISSING else entry.default


def _parsed(kind: type[Any], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return values of the types that options have."""
    from ghost_engines.cli.errors import CommandError

    hints, found = get_type_hints(kind), dict[str, Any]()
    for name, value in values.items():
        try:
            found[name] = _value(value, hints[name])
        except ValueError as error:
            raise CommandError(f"--config: {name} in {path} is {value!r}{error}") from error
    return found


def _value(value: Any, kind: Any) -> Any:
    """Return what a file says as a value of the type that an option has.

    Raises:
        ValueError: If it is none; it says what would be one.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        return None if value is None and NoneType in inside else _value(value, inside[0])
    if origin is Literal:
        if value not in inside:
            raise ValueError(f"; there are {', '.join(map(str, inside))}")
        return value
    if origin in _SEVERAL and len({*inside} - {...}) == 1:
        return _several(value, list if origin is Sequence else origin, inside[0])
    if origin is not None or is_dataclass(kind):
        raise ValueError(", and can be given in the shell only")
    return _single(value, kind)


def _several(value: Any, container: Any, kind: Any) -> Any:
    """Return several values; those by name are NAME=VALUE in the shell."""
    if isinstance(value, Mapping):
        return container(_value(f"{key}={_text(each)}", kind) for key, each in value.items())
    return container(_value(each, kind) for each in (value if isinstance(value, list) else [value]))


def _single(value: Any, kind: Any) -> Any:
    """Return one value."""
    if kind in (int, bool):
        if type(value) is not kind:
            raise ValueError(", and should be " + ("true or false" if kind is bool else "whole"))
        return value
    if kind is str and isinstance(value, list):
        return ",".join(map(_text, value))
    text = _text(value)
    try:
        return kind[text] if issubclass(kind, Enum) else kind(text)
    except Exception as error:  # any class may be that of an option
        raise ValueError(f", and should be {_called(kind)}") from error


def _called(kind: Any) -> str:
    if kind is float:
        return "a number"
    return ", ".join(kind.__members__) if issubclass(kind, Enum) else f"a {kind.__name__}"


def _text(value: Any) -> str:
    """Return one value as the shell would give it.

    Raises:
        ValueError: If it is none, or several.
    """
    if value is None or isinstance(value, bool | Mapping | list):
        raise ValueError(", and should be one value")
    return str(value)
