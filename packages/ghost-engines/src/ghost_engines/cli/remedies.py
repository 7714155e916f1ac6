"""What to do about errors, as somebody at a shell can do it."""

from __future__ import annotations

from ghost_core import GhostError
from ghost_engines.cli.errors import CommandError
from ghost_engines.store import MissingLogError, MissingStoreError, SeveralRowsError

_REMEDIES: dict[type[GhostError], str] = {
    MissingStoreError: "give the folder of one, or make one with `ghost project`",
    MissingLogError: "give the folder that a training run logged its values in",
    SeveralRowsError: "leave a store out, or let later rows count with --replace",
}
"""By the kind of the error, whose own remedy is for programs."""


def in_shell(error: GhostError) -> GhostError:
    """Return an error with the remedy that a shell has for it, where that is another one."""
    for kind, remedy in _REMEDIES.items():
        if isinstance(error, kind):
            return CommandError(error.what, reason=error.reason, remedy=remedy)
    return error
