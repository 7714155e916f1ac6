"""All cases, subject by subject."""

from __future__ import annotations

from fnmatch import fnmatchcase

from bench import attention, convolution, foreign, language, projection, store
from bench.case import Case, Group

CASES: tuple[Case, ...] = (
    *language.CASES,
    *projection.CASES,
    *convolution.CASES,
    *attention.CASES,
    *foreign.CASES,
    *store.CASES,
)
"""In the order of the table."""

GROUPS: tuple[Group, ...] = (foreign.GROUP,)


def chosen(patterns: list[str]) -> list[Case]:
    """Return the cases whose name or group one of the globs matches; all if there are none.

    Raises:
        ValueError: If a glob matches nothing.
    """
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in CASES):
            known = ", ".join(case.name for case in CASES)
            raise ValueError(f"no case is named {pattern!r}: there are {known}")
    return [case for case in CASES if not patterns or any(_matches(case, p) for p in patterns)]


def _matches(case: Case, pattern: str) -> bool:
    return fnmatchcase(case.name, pattern) or case.group == pattern
