"""Interrupts before any line of the code that stores and logs are written with, or of all code."""

import random
import sys
from pathlib import Path

import ghost_core
import ghost_engines

ROOT = Path(ghost_engines.__file__).parent
WATCHED = tuple(str(ROOT / part) for part in ("store", "search", "log", "files.py"))
EVERYWHERE = (str(ROOT), str(Path(ghost_core.__file__).parent))


class Interrupt:
    """Raises before the n-th line of the store's code, or of others, that runs in the block."""

    def __init__(self, at, watched=WATCHED):
        self.at, self.lines, self.where = at, 0, ""
        self._watched = watched

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *exception):
        sys.settrace(self._before)

    def _called(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(self._watched) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


class Listed(Interrupt):
    """Notes when each line of the code runs, and interrupts nothing."""

    def __init__(self, watched=WATCHED):
        super().__init__(0, watched)
        self.runs = {}

    def _line(self, frame, event, argument):
        found = super()._line(frame, event, argument)
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            self.runs.setdefault(place, []).append(self.lines)
        return found

    def one_of_each(self):
        """Return, for each line, the number of an interrupt before one of its runs."""
        draw = random.Random(0)
        return sorted(draw.choice(runs) for runs in self.runs.values())


def attempts(stride, watched=WATCHED):
    """Yield interrupts before later and later lines, until one comes too late."""
    at = 1
    while True:
        interrupt = Interrupt(at, watched)
        yield interrupt
        if interrupt.lines < at:
            break
        at += stride
    assert at > 20
