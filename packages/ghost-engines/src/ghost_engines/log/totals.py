"""Values added up over the steps of a log."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ghost_engines.plots import sample_figure, save
from ghost_engines.tables import Columns, Table
from ghost_engines.values import COUNTS, CreditedStep
from ghost_engines.values import Table as Sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LogTable(Table):
    """What each sample was credited with over the steps of a log.

    **Positive means that the sample lowered the validation loss.**

    Attributes:
        directions: Names of the K directions.
        ids: Sample ids, int64 `[S]`, in the order in which they came first.
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
        return f"LogTable({facts}, K={len(self.directions)} ({names}))"

    def columns(self) -> Columns:
        """Return the columns: `id`, `value`, `times_seen`, `first_step`, `last_step`, `altered`.

        With several directions there is a column `value_NAME` for each.
        """
        single = len(self.directions) == 1
        names = ["value" if single else f"value_{name}" for name in self.directions]
        return {
            "id": self.ids,
            **{name: self.values[:, at] for at, name in enumerate(names)},
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


def totals(
    steps: Iterable[CreditedStep],
    directions: tuple[str, ...],
    advance: Callable[[int], object],
) -> LogTable:
    """Add up steps.

    Args:
        steps: The steps.
        directions: Names of the directions.
        advance: Told how many steps are done.
    """
    sums, k = Sums(directions), len(directions)
    numbers, by_step = [], []
    for each in steps:
        if len(each.ids):
            sums.add(each)
        numbers.append(each.step)
        by_step.append(each.values.sum(0) if len(each.ids) else torch.zeros(k))
        advance(1)
    return LogTable(
        directions=directions,
        ids=sums.ids,
        values=sums.values,
        counts=sums.counts,
        steps=np.array(numbers, dtype=np.int64),
        by_step=np.array([each.tolist() for each in by_step]).reshape(
            len(numbers), len(directions)
        ),
    )
