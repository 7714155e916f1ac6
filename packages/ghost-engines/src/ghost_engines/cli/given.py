"""The options of `ghost project` that a store was made with, as somebody would give them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from ghost_engines.cli.options import Project

_DEFAULTS = {each.name: each.default for each in fields(Project) if each.name != "config"}

_FREE = ("model", "data", "store", "device", "batch_size", "tokens_per_batch", "unit")
"""Options that change no row, or name what has a digest: models and data may move."""


def is_config(note: object) -> bool:
    """Tell whether a note of a store has the options that `ghost project` was given."""
    needed = {name for name, default in _DEFAULTS.items() if default is MISSING}
    return isinstance(note, dict) and needed <= note.keys() <= _DEFAULTS.keys()


def given(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield options with their values, but for those that are the defaults."""
    for name, value in config.items():
        default = _DEFAULTS[name]
        if value is not None and value != (
            list(default) if isinstance(default, tuple) else default
        ):
            yield _option(name) if value is True else f"{_option(name)} {_value(value)}"


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each option that changes rows and is another one now.

    Args:
        before: All options in effect, as a store has them.
        now: Those of this call; tuples are as good as lists.
    """
    for name in now:
        if name in _FREE or name not in before:
            continue
        pair = _value(before[name]), _value(now[name])
        if pair[0] != pair[1]:
            yield f"{_option(name)}: {pair[0]} in the store, {pair[1]} now"


def _option(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _value(value: object) -> str:
    match value:
        case None | False | [] | ():
            return "not given"
        case True:
            return "given"
        case list() | tuple():
            return shlex.join(map(str, value))
        case _:
            return shlex.quote(str(value))
