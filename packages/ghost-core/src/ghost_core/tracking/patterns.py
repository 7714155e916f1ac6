"""Globs over dotted names: of parameters, to select them, and of modules, to give them options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from ghost_core.errors import CaptureError, UnknownNameError

Patterns = str | Sequence[str] | Set[str]
"""Globs over dotted names: one, several separated by commas, or a collection."""

ValueT = TypeVar("ValueT")


def as_patterns(patterns: Patterns, option: str = "layers") -> tuple[str, ...]:
    """Split comma-separated globs.

    Args:
        patterns: The globs.
        option: What they were given as, for the error.

    Raises:
        CaptureError: If they are none.
    """
    given = (patterns,) if isinstance(patterns, str) else patterns
    listed = isinstance(given, Sequence | Set) and all(isinstance(each, str) for each in given)
    if not listed:
        raise CaptureError(
            f"{option} must be a glob over names of modules and parameters, or several, not "
            f"{patterns!r}",
            reason=f"it is of type {type(patterns).__name__}, or one of them is no str",
            remedy=f"write a str such as {option}='encoder.*', or a list of them; "
            "model.named_parameters() has the names",
        )
    return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


def select_parameters(
    names: Iterable[list[str]], patterns: Patterns, option: str = "layers"
) -> set[str]:
    """Return the first names of the parameters that match one of the patterns."""
    groups = list(names)
    chosen: set[str] = set()
    for pattern in as_patterns(patterns, option):
        found = {
            aliases[0] for aliases in groups if any(_matches(pattern, alias) for alias in aliases)
        }
        if not found:
            known = {prefix for aliases in groups for alias in aliases for prefix in _paths(alias)}
            hint = "Patterns are globs over names of modules and parameters, as in '*attn*'."
            raise UnknownNameError("layer", pattern, known, hint, most=10)
        chosen |= found
    return chosen


def _matches(pattern: str, name: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in _paths(name))


def _paths(name: str) -> list[str]:
    """Return a dotted name and all its prefixes: `a.b.c` gives `a`, `a.b` and `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def by_module(
    model: nn.Module,
    option: str,
    given: Mapping[str, ValueT],
    check: Callable[[str, ValueT], ValueT],
) -> dict[str, ValueT]:
    """Resolve an option given by globs over names of modules; later ones win.

    Args:
        model: The root module.
        option: The option's name, for errors.
        given: The values by glob.
        check: Returns a value as it is used, or raises; it is told what it is.

    Raises:
        UnknownNameError: If a glob matches no module.
        CaptureError: If it is no mapping, or a value is refused.
    """
    if not isinstance(given, Mapping):
        raise CaptureError(
            f"{option} is a mapping of globs over names of modules, not {given!r}",
            reason="each module has a value of its own",
            remedy=f"give values by glob, such as {option}={{'encoder.*': ...}}; '*' is all",
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    values: dict[str, ValueT] = {}
    for pattern, value in given.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UnknownNameError(f"module in {option}", pattern, names)
        values |= dict.fromkeys(matching, check(f"{option} of {pattern!r}", value))
    return values
