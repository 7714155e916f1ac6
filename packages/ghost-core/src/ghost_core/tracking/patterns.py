"""Globs over dotted names: of parameters, to select them, and of modules, to give them options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from ghost_core.errors import CaptureError, UnknownNameError

Patterns = str | Sequence[str]
"""Globs over dotted names: one, several separated by commas, or a sequence."""

ValueT = TypeVar("ValueT")


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Split comma-separated globs."""
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


def select_parameters(names: Iterable[list[str]], patterns: Patterns) -> set[str]:
    """Return the first names of the parameters that match one of the patterns."""
    groups = list(names)
    chosen: set[str] = set()
    for pattern in as_patterns(patterns):
        found = {
            aliases[0] for aliases in groups if any(_matches(pattern, alias) for alias in aliases)
        }
        if not found:
            known = {prefix for aliases in groups for alias in aliases for prefix in _paths(alias)}
            hint = "Patterns are globs over names of modules and parameters, as in '*attn*'."
            raise UnknownNameError("layer", pattern, known, hint)
        chosen |= found
    return chosen


def _matches(pattern: str, name: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in _paths(name))


def _paths(name: str) -> list[str]:
    """Return a dotted name and all its prefixes: `a.b.c` gives `a`, `a.b` and `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def by_module(model: nn.Module, option: str, given: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """Resolve an option given by globs over names of modules; later ones win.

    Raises:
        UnknownNameError: If a glob matches no module.
    """
    if not isinstance(given, Mapping):
        raise CaptureError(
            f"{option} is a mapping of globs over names of modules, such as {{'*': ...}}, not "
            f"{given!r}"
        )
    kind = int if option == "batch_dim" else str
    if wrong := [value for value in given.values() if type(value) is not kind]:
        raise CaptureError(f"values of {option} are of type {kind.__name__}, not {wrong[0]!r}")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    values: dict[str, ValueT] = {}
    for pattern, value in given.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UnknownNameError(f"module in {option}", pattern, names)
        values |= dict.fromkeys(matching, value)
    return values
