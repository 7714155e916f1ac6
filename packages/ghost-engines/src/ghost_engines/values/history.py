"""Values over time: what they were at moments of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ghost_core import CaptureError, UnknownNameError
from ghost_engines.tables import Columns, Table
from ghost_engines.values.columns import value_columns
from ghost_engines.values.sums import Floats, Sums


class History(Table):
    """What the values of all samples were at some moments, each a sum since the beginning.

    As a table it has a row for each moment and each sample that was credited by then: `step`,
    `moment`, `id`, and `value` or a column `value_NAME` for each direction.

    Args:
        sums: Returns what is added up.
        every: Steps between moments; None if there are only those that are asked for.
    """

    def __init__(self, sums: Callable[[], Sums], every: int | None) -> None:
        self._find = sums
        self._every = every
        self._steps: list[int] = []
        self._labels: list[str] = []
        self._values: list[Floats] = []

    @property
    def _sums(self) -> Sums:
        return self._find()

    def __len__(self) -> int:
        """Return the number of moments M."""
        return len(self._steps)

    def __repr__(self) -> str:
        """Say how many moments there are."""
        return f"History({len(self)} moments, {len(self._sums)} samples)"

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the last steps before each moment."""
        return tuple(self._steps)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the moments are called."""
        return tuple(self._labels)

    def of(self, sample: int, direction: str | None = None) -> Floats:
        """Return the values of a sample at all moments, float64 `[M]`; zero before its first step.

        Args:
            sample: Its id.
            direction: Name of the direction; needed if there are several.

        Raises:
            UnknownNameError: If no step was made with it, or there is no such direction.
            CaptureError: If there are several directions, and none is named.
        """
        column = column_of(self._sums.directions, direction)
        if sample not in self._sums:
            raise UnknownNameError("sample", str(sample), map(str, self._sums.ids.tolist()))
        row = self._sums.row(sample)
        return np.array([each[row, column] if row < len(each) else 0.0 for each in self._values])

    def columns(self) -> Columns:
        """Return the columns `step`, `moment`, `id`, and the values."""
        sizes = [len(each) for each in self._values]
        values = np.concatenate([np.zeros((0, len(self._sums.directions))), *self._values])
        ids = [self._sums.ids[:size] for size in sizes]
        return {
            "step": np.repeat(np.array(self._steps, dtype=np.int64), sizes),
            "moment": np.repeat(np.array(self._labels, dtype=object), sizes),
            "id": np.concatenate([np.zeros(0, dtype=np.int64), *ids]),
            **value_columns(values, self._sums.directions),
        }

    def mark(self, step: int, label: str) -> None:
        """Keep the values as they are now."""
        self._steps.append(step)
        self._labels.append(label)
        self._values.append(self._sums.values.copy())

    def stepped(self, step: int) -> None:
        """Keep the values if it is time to."""
        if self._every is not None and step % self._every == 0:
            self.mark(step, f"step {step}")

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, as tensors."""
        values = [torch.from_numpy(each) for each in self._values]
        return {"steps": list(self._steps), "labels": list(self._labels), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments of another process."""
        self._steps, self._labels = list(state["steps"]), list(state["labels"])
        self._values = [each.cpu().numpy().copy() for each in state["values"]]


def column_of(directions: tuple[str, ...], direction: str | None) -> int:
    """Return the column of a direction, or of the only one.

    Raises:
        UnknownNameError: If there is no such direction.
        CaptureError: If there are several, and none is named.
    """
    if direction is None and len(directions) != 1:
        listed = ", ".join(directions)
        raise CaptureError(f"there are {len(directions)} directions: name one of {listed}")
    if direction is not None and direction not in directions:
        raise UnknownNameError("direction", direction, directions)
    return 0 if direction is None else directions.index(direction)
