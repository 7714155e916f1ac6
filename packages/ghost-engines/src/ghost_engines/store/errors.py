"""What can go wrong with a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ghost_core import GhostError


class StoreError(GhostError):
    """A store was asked for something that it cannot do."""


class DamagedStoreError(StoreError):
    """A file of a store is missing, cut off, altered, or belongs to another store."""


class MissingStoreError(StoreError):
    """There is no store at a place."""


class MissingLogError(StoreError):
    """There is no score log at a place."""


class SeveralRowsError(StoreError):
    """Stores that are to be merged have rows of the same samples."""


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Run checks to the end.

    Raises:
        DamagedStoreError: If one found damage. It says what all of them found.
    """
    problems = []
    for check in checks:
        try:
            check()
        except DamagedStoreError as error:
            problems.append(str(error))
    if problems:
        raise DamagedStoreError("\n".join(problems))
