"""Writers in forked processes that are killed at any of their steps.

Forking costs nothing, starting Python with torch takes seconds: a script forks many writers.
"""

import itertools
import os
import signal
import struct
import sys
import textwrap
from pathlib import Path

CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink")
"""The functions of `os` that a write is made of."""

_write = os.write


def kill_at(step, names=CALLS):
    """Die before the given system call of those that follow; a write has written half by then."""
    calls = itertools.count()

    def dying(name, real):
        def call(*arguments, **named):
            if next(calls) == step:
                if name == "write":
                    descriptor, data = arguments
                    real(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in names:
        setattr(os, name, dying(name, getattr(os, name)))


def fork(work):
    """Return a child's pid and the end of a pipe on which it acknowledges numbers."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            work(lambda n: _write(writing, struct.pack("q", n)))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    return pid, reading


def finish(pid, reading):
    """Return a child's exit status and the last number that it acknowledged."""
    acknowledged = 0
    with open(reading, "rb") as pipe:
        while len(packed := pipe.read(8)) == 8:
            acknowledged = struct.unpack("q", packed)[0]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status, acknowledged


def script(code, *arguments):
    """Return the command that runs a script, which can import the kit."""
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return [sys.executable, "-c", path + textwrap.dedent(code), *map(str, arguments)]


def run_script(fresh, code, *arguments):
    """Run a script, which can import the kit, in a process of its own."""
    done = fresh(textwrap.dedent(code), *arguments, paths=[Path(__file__).parent])
    assert done.returncode == 0, done.stderr
