"""Switches of the whole process, thrown for a while by any number of threads at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from threading import RLock
from typing import Any

from ghost_core.restoring import restored, undo


@dataclass(frozen=True, eq=False)
class Switch:
    """A setting of the process.

    Attributes:
        read: Returns its value.
        write: Sets it.
        needed: The value that it has while it is thrown.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    needed: Any

    @classmethod
    def of(cls, make: Callable[[], AbstractContextManager[Any]]) -> Switch:
        """Return a switch that is thrown while a context is entered, which `make` makes."""
        stack, entered = ExitStack(), False

        def write(thrown: bool) -> None:
            nonlocal entered
            if thrown:
                entered = True  # first: an interrupt may come before the next line
                stack.enter_context(make())
            else:
                stack.close()
                entered = False

        return cls(lambda: entered, write, True)


class Switches:
    """Switches that are thrown together, from when the first needs it until the last does not.

    If every thread saved and restored a setting by itself, one that came while it was thrown would
    take that for what the user had chosen, and put it "back" for good:

        thread 1  saves tf32, sets ieee           restores tf32
        thread 2                       saves ieee               restores ieee

    What somebody else sets meanwhile is overruled for who comes next, and stays afterwards.

    Args:
        switches: The switches.
    """

    def __init__(self, *switches: Switch) -> None:
        self._switches = switches
        self._found: dict[Switch, Any] = {}
        self._users: set[object] = set()
        self._lock = RLock()

    @property
    def in_use(self) -> bool:
        """Whether they are thrown."""
        return bool(self._users or self._found)

    @contextmanager
    def thrown(self) -> Iterator[None]:
        """Throw the switches for a while."""
        user = object()
        with restored() as stack:
            undo(stack, self._leave, user)
            self._users.add(user)
            self._settle()
            yield

    def _leave(self, user: object) -> None:
        self._users.discard(user)
        self._settle()

    def _settle(self) -> None:
        """Throw the switches or put them back, whichever is due; once more does no harm."""
        try:
            self._lock.acquire()
            if self._users:
                self._throw()
            elif self._found:
                self._put_back()
        finally:
            # As often as it was acquired: an interrupt may have come before the last release.
            with suppress(RuntimeError):
                while True:
                    self._lock.release()

    def _throw(self) -> None:
        for switch in self._switches:
            value = switch.read()
            if value != switch.needed:
                self._found[switch] = value
                switch.write(switch.needed)

    def _put_back(self) -> None:
        for switch, value in self._found.items():
            if switch.read() == switch.needed:
                switch.write(value)
        self._found.clear()
