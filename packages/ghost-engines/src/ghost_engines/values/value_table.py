"""Values by sample at one moment: a table to keep, to write to files, and to plot."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ghost_engines.plots import sample_figure, save
from ghost_engines.tables import Columns, Table
from ghost_engines.values.sums import COUNTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ValueTable(Table):
    """What each sample was credited with, over some steps.

    **Positive means that the sample lowered the validation loss.**

    Attributes:
        directions: Names of the K directions.
        ids: Sample ids, int64 `[S]`.
        values: Sums over steps, float64 `[S, K]`.
        counts: How often each sample was credited, by which step first and last, and how often by
            steps whose gradients were changed in a way that values do not know, int64 `[S, 4]`.
        steps: Numbers of the steps, int64 `[B]`.
        by_step: What each step credited to all of its samples, float64 `[B, K]`.
    """

    directions: tuple[str, ...]
    ids: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    steps: np.ndarray
    by_step: np.ndarray

    def __len__(self) -> int:
        """Return the number of samples S."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Say how large it is."""
        names = reprlib.repr(", ".join(self.directions))[1:-1]
        facts = f"{len(self)} samples, {len(self.steps)} steps"
        return f"{type(self).__name__}({facts}, K={len(self.directions)} ({names}))"

    def columns(self) -> Columns:
        """Return the columns: `id`, `value`, `times_seen`, `first_step`, `last_step`, `altered`.

        With several directions there is a column `value_NAME` for each.
        """
        return {
            "id": self.ids,
            **value_columns(self.values, self.directions),
            **{name: self.counts[:, at] for at, name in enumerate(COUNTS)},
        }

    def plot(self, path: str | Path | None = None, *, top: int = 10) -> Figure:
        """Draw the most helpful and most harmful samples, the distribution, and sums over time.

        Args:
            path: Where to write the picture, if anywhere: .png, .svg, .pdf.
            top: How many samples to name of each.

        Returns:
            A figure with a row for each direction.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            OSError: If the file cannot be written.
        """
        over = ("step", self.steps, self.by_step.cumsum(0))
        figure = sample_figure(
            self.ids, self.values, self.directions, "value", signed=True, top=top, over=over
        )
        return save(figure, path)


def value_columns(values: np.ndarray, directions: tuple[str, ...]) -> Columns:
    """Return the columns of values `[S, K]`: `value`, or `value_NAME` for each of several."""
    single = len(directions) == 1
    names = ["value" if single else f"value_{name}" for name in directions]
    return {name: values[:, at] for at, name in enumerate(names)}
