"""Runs programs in processes that have imported torch, which takes seconds, and nothing of ghost's.

One process imports torch and waits. Each program runs in a fork of it, which ends as any program.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 600
"""How many seconds a program may take."""


class Fresh:
    """Runs programs one after the other.

    Args:
        waiting: The process that forks.
    """

    def __init__(self, waiting: subprocess.Popen[str]) -> None:
        self._waiting = waiting

    def __call__(
        self, code: str, *arguments: object, paths: tuple[object, ...] = (), cwd: object = "."
    ) -> subprocess.CompletedProcess[str]:
        """Run code as `python -c` does.

        Args:
            code: The program.
            arguments: What follows its name in `sys.argv`.
            paths: Folders that packages are found in besides and before the usual ones.
            cwd: The folder that it runs in.

        Returns:
            Its exit status, negative for a signal, and what it wrote.
        """
        with tempfile.TemporaryDirectory() as folder:
            request: dict[str, Any] = {
                "code": code,
                "arguments": ["-c", *map(str, arguments)],
                "paths": [*map(str, paths)],
                "cwd": os.path.abspath(str(cwd)),
                "streams": [os.devnull, f"{folder}/out", f"{folder}/err"],
                "environment": dict(os.environ),
            }
            asked, answers = self._waiting.stdin, self._waiting.stdout
            assert asked is not None
            assert answers is not None
            asked.write(json.dumps(request) + "\n")
            asked.flush()
            status = int(answers.readline())
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess([code, *arguments], status, out, err)


@contextmanager
def waiting() -> Iterator[Fresh]:
    """Start the process that forks, and end it."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fresh"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Fresh(process)


def serve() -> dict[str, Any] | None:
    """Fork for each request, and return it in the fork; return None when there are no more."""
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return dict(json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()
    return None


def become(request: dict[str, Any]) -> None:
    """Make this process look like one that was started for a program."""
    for descriptor, path in enumerate(request["streams"]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.alarm(LIMIT)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["arguments"]
    sys.path[:1] = ["", *request["paths"]]


if __name__ == "__main__":
    import torch  # noqa: F401  # what all this is for

    gc.freeze()  # no fork looks for garbage in it, which would copy all of it
    if (request := serve()) is not None:
        become(request)
        exec(compile(request["code"], "<program>", "exec"), {"__name__": "__main__"})
