"""Values by sample at one moment: a table to keep, to write to files, and to plot."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import distributed

from ghost_core import CaptureError
from ghost_engines.plots import sample_figure, save
from ghost_engines.tables import Columns, Table
from ghost_engines.values.columns import value_columns
from ghost_engines.values.groups import Groups, GroupValues, grouped
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

    @classmethod
    def union(cls, tables: Sequence[ValueTable]) -> ValueTable:
        """Return the values that several processes, or runs, credited as those of one.

        Values of a sample that is in several tables add up, as do those of a step.

        Args:
            tables: Of the same directions, but for those without samples.

        Raises:
            CaptureError: If there is none, something else is given, or directions differ.
        """
        given = list(tables) if isinstance(tables, Iterable) else [tables]
        if not given or not all(isinstance(each, cls) for each in given):
            kinds = ", ".join(dict.fromkeys(type(each).__name__ for each in given)) or "nothing"
            raise CaptureError(f"tables to unite must be a list of {cls.__name__}, not {kinds}")
        tables = [each for each in given if len(each)] or given[:1]
        names = {each.directions for each in tables}
        if len(names) != 1:
            raise CaptureError(f"tables to unite must be of the same directions, not {names}")
        ids, rows = _places([each.ids for each in tables])
        steps, moments = _places([each.steps for each in tables])
        counts = np.concatenate([each.counts for each in tables])
        times, first, last, altered = (np.zeros(len(ids), dtype=np.int64) for _ in COUNTS)
        first += np.iinfo(np.int64).max
        np.add.at(times, rows, counts[:, 0])
        np.minimum.at(first, rows, counts[:, 1])
        np.maximum.at(last, rows, counts[:, 2])
        np.add.at(altered, rows, counts[:, 3])
        values = _added(rows, [each.values for each in tables], len(ids))
        order = np.argsort(values[:, 0], kind="stable")
        return cls(
            directions=tables[0].directions,
            ids=ids[order],
            values=values[order],
            counts=np.stack([times, first, last, altered], 1)[order],
            steps=steps,
            by_step=_added(moments, [each.by_step for each in tables], len(steps)),
        )

    def gathered(self, group: Any) -> ValueTable:
        """Return the values of all processes of a group, in each of them: see `union`.

        Args:
            group: The group, in which all processes ask for this at the same place.

        Raises:
            CaptureError: If their directions differ.
        """
        tables: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(tables, self, group=group)
        return type(self).union(tables)

    def by_group(self, groups: Groups) -> GroupValues:
        """Add up the values of groups of samples: see `InRunValues.by_group`.

        Raises:
            UnknownNameError: If a sample has no group.
        """
        return grouped(self.ids, self.values, self.directions, groups)

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


def _places(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the different numbers of all parts, sorted, and where each of them stands there."""
    found, places = np.unique(np.concatenate(parts), return_inverse=True)
    return found, places.reshape(-1)


def _added(places: np.ndarray, parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return the sums of rows that have the same place, `[count, K]`."""
    rows = np.concatenate(parts)
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, places, rows)
    return sums
