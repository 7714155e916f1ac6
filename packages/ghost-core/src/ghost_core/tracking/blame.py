"""Says of what a sampler raises whose sampler it is, and what it was asked for."""

from __future__ import annotations

from types import TracebackType

from ghost_core.errors import GhostError


class Blame:
    """Adds a note to exceptions that are raised inside, of whatever type they are.

    They stay what they are: callers may wait for `torch.OutOfMemoryError`.

    Args:
        note: What is noted.
    """

    def __init__(self, note: str) -> None:
        self._note = note

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Add the note."""
        if isinstance(error, Exception):
            self.note(error)

    def note(self, error: Exception) -> None:
        """Add the note to an exception, unless ghost itself has said what is wrong."""
        if not isinstance(error, GhostError):
            error.add_note(self._note)
