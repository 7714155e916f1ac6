"""Losses and other numbers of a run, a line for each moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ghost_core import CaptureError
from ghost_engines.files import write_atomically

FILE = "metrics.jsonl"


class Metrics:
    """Appends lines such as `{"step": 3, "loss": 0.5}` to a file.

    They are kept in memory, tensors where they are, until `write` is called.

    Args:
        folder: The folder of the file, which is there.
        after: Number of the last step whose lines are kept, if there are any.
    """

    def __init__(self, folder: Path, after: int) -> None:
        self._path = folder / FILE
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        if self._path.exists():
            kept = [line for line in self._lines() if json.loads(line)["step"] <= after]
            write_atomically(self._path, b"".join(kept), folder)

    def add(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Keep the numbers of a moment.

        Raises:
            CaptureError: If one is no number, or is called "step".
        """
        for name, each in metrics.items():
            single = isinstance(each, Tensor) and each.numel() == 1
            if name == "step" or not (single or isinstance(each, int | float)):
                raise CaptureError(f"a metric has a name but 'step', and one number: {name}={each}")
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
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self._waiting = []

    def _lines(self) -> list[bytes]:
        """Return the lines that are complete: the last may be cut off, where a process was."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n")]


def _number(each: float | Tensor) -> float:
    return each.item() if isinstance(each, Tensor) else each
