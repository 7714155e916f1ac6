"""Every exception that ghost raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def in_lines(what: str, reason: str, remedy: str) -> str:
    """Say what is wrong, why, and what to do about it, in a line each, as far as there is any."""
    because = f"Reason: {reason.rstrip('.')}." if reason else ""
    instead = f"Remedy: {remedy}" if remedy else ""
    return "\n".join(filter(None, (what, because, instead)))


class GhostError(Exception):
    """Base class of all ghost errors. They can be pickled, to cross processes.

    Its text has up to three parts, a line each: `what`, `Reason: ...` and `Remedy: ...`.

    Args:
        what: What is wrong, and where.
        reason: Why it is.
        remedy: What to do about it.

    Attributes:
        what: What is wrong, and where.
        reason: Why it is; empty where `what` says all.
        remedy: What to do about it; empty where `what` says all.
    """

    def __init__(self, what: str = "", *, reason: str = "", remedy: str = "") -> None:
        self.what, self.reason, self.remedy = what, reason, remedy
        super().__init__(in_lines(what, reason, remedy))

    def __reduce__(self) -> tuple[Callable[..., GhostError], tuple[object, ...]]:
        return _rebuild, (type(self), self.args, vars(self))


def _rebuild(
    kind: type[GhostError], args: tuple[object, ...], attributes: dict[str, object]
) -> GhostError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


class CaptureError(GhostError):
    """An engine was set up or used in a way that cannot give right numbers.

    An option does not fit, the engine was used at the wrong time, or the model did not run as a
    capture needs it to.
    """


class WrongSplitError(GhostError):
    """The rows that reach a module cannot be told apart by sample."""


class UnbalancedError(WrongSplitError):
    """The contributions of all samples do not add up to the gradient that autograd made."""


class UnsupportedLayerError(GhostError):
    """A selected parameter belongs to a module that no sampler handles."""


class UnknownNameError(GhostError, ValueError):
    """A name that does not exist: a layer, an option, a direction, a projection."""

    def __init__(
        self, kind: str, name: object, choices: Iterable[str], hint: str = "", most: int = 40
    ) -> None:
        listed = sorted(choices)
        message = f"unknown {kind} {name!r}"
        if close := isinstance(name, str) and difflib.get_close_matches(name, listed, n=1):
            message += f"; did you mean {close[0]!r}?"
        else:
            message += "."
        # The name of the model itself, among its modules, is empty.
        shown = ", ".join(each or "'' (the model)" for each in listed[:most]) or "none"
        more = f" and {len(listed) - most} more" if len(listed) > most else ""
        parts = [f"Available: {shown}{more}.", hint]
        if more:  # nobody reads on after a list that is that long
            parts.reverse()
        super().__init__(" ".join(filter(None, (message, *parts))))


class UnknownOptionError(UnknownNameError, TypeError):
    """A keyword argument that does not exist."""


class PluginError(GhostError):
    """A plugin's contribution cannot be used."""


class PluginConflictError(PluginError):
    """Two plugins offer the same thing under the same name."""


class MissingExtraError(GhostError, ImportError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install '{extra}'"
        )


def told(error: BaseException) -> str:
    """Say what somebody else's code raised, in words of its own; even those may be broken."""
    try:
        said = str(error)
    except Exception:  # whatever `__str__` raises is another fault of the same code
        said = "(it cannot be printed)"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}{': ' if said else ''}{said}{notes}"
