"""Losses and other numbers of a run, a line for each moment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ghost_core import CaptureError
from ghost_engines.files import write_atomically

FILE = "metrics.jsonl"


class Metrics:
    """Appends lines such as `{"step": 3, "loss": 0.5}` to a file.

    They are kept in memory, tensors where they are, until `write` is called. What is not finite is
    written as Python's `json` reads it back: `NaN`, `Infinity` and `-Infinity`.

    Args:
        folder: The folder of the file, which is there.
        after: Number of the last step whose lines are kept, if there are any.

    Raises:
        CaptureError: If a line of the file is none of a metric.
    """

    def __init__(self, folder: Path, after: int) -> None:
        self._path = folder / FILE
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        if self._path.exists():
            kept = [line for step, line in self._lines() if step <= after]
            write_atomically(self._path, b"".join(kept), folder)
        self._size = self._path.stat().st_size if self._path.exists() else 0

    def add(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Keep the numbers of a moment.

        Raises:
            CaptureError: If one is no real number, or is called "step".
        """
        for name, each in metrics.items():
            if name == "step" or not _is_number(each):
                raise CaptureError(
                    f"a metric has a name but 'step', and one number, which is real: "
                    f"{name} is {each if isinstance(each, Tensor) else type(each).__name__}"
                )
        copied = {
            name: each.detach().clone() if isinstance(each, Tensor) else each
            for name, each in metrics.items()
        }
        self._waiting.append((step, copied))

    def write(self) -> None:
        """Append what waits, so that it is on disk once this returns.

        Raises:
            OSError: If that fails.
        """
        if not self._waiting:
            return
        lines = [
            {"step": step, **{name: _number(each) for name, each in metrics.items()}}
            for step, metrics in self._waiting
        ]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with self._path.open("ab") as file:
            # What a write that failed has left goes: its lines are written again.
            file.truncate(min(self._size, file.tell()))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._size, self._waiting = file.tell(), []  # at once: an interrupt may come next

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield complete lines with their steps: the last may be cut off, where a process was."""
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                continue
            try:
                yield int(json.loads(line)["step"]), line
            except (ValueError, TypeError, KeyError) as error:
                raise CaptureError(
                    f"line {number} of {self._path} has no metrics: {line[:60]!r}",
                    reason="the file was altered, or its disk failed",
                    remedy="remove that line to go on without it",
                ) from error


def _is_number(each: object) -> bool:
    """Tell whether this is one number that a line can hold."""
    if isinstance(each, Tensor):
        return each.numel() == 1 and not each.is_complex() and not each.is_meta
    # An int may be longer than what Python writes.
    return isinstance(each, float) or (isinstance(each, int) and abs(each) <= sys.float_info.max)


def _number(each: float | Tensor) -> float:
    return each.item() if isinstance(each, Tensor) else each
