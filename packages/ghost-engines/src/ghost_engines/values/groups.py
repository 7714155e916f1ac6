"""Values of groups of samples: of training domains, say, for each direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ghost_core import UnknownNameError
from ghost_engines.plots import heat_map, save
from ghost_engines.tables import Columns, Table
from ghost_engines.values.columns import value_columns
from ghost_engines.values.sums import Floats, Integers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Groups = Mapping[int, str] | Callable[[int], str]
"""The name of each sample's group, by its id."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GroupValues(Table):
    """Sums of values over groups of samples, a row for each group, sorted by name.

    Attributes:
        directions: Names of the K directions.
        groups: Names of the G groups.
        values: Sums of the values of their samples, float64 `[G, K]`.
        samples: Number of samples of each, int64 `[G]`.
    """

    directions: tuple[str, ...]
    groups: tuple[str, ...]
    values: Floats
    samples: Integers

    def __repr__(self) -> str:
        """Say how large it is."""
        return f"GroupValues({len(self.groups)} groups, {', '.join(self.directions)})"

    def columns(self) -> Columns:
        """Return the columns `group`, `value` or `value_NAME` for each direction, and `samples`."""
        return {
            "group": np.array(self.groups, dtype=object),
            **value_columns(self.values, self.directions),
            "samples": self.samples,
        }

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw a heat map: groups down, directions across.

        Args:
            path: Where to write the picture, if anywhere: .png, .svg, .pdf.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            OSError: If the file cannot be written.
        """
        return save(heat_map(self.values, self.groups, self.directions, "value"), path)


def grouped(ids: Integers, values: Floats, directions: tuple[str, ...], of: Groups) -> GroupValues:
    """Add up values by group.

    Args:
        ids: Sample ids, `[S]`.
        values: Their values, `[S, K]`.
        directions: Names of the K directions.
        of: The name of each sample's group.

    Raises:
        UnknownNameError: If a sample has none.
    """
    names = []
    for sample in ids.tolist():
        if isinstance(of, Mapping) and sample not in of:
            raise UnknownNameError("sample", str(sample), map(str, of), "It has no group.")
        names.append(str(of[sample] if isinstance(of, Mapping) else of(sample)))
    groups, rows = np.unique(np.array(names, dtype=str), return_inverse=True)
    sums = np.zeros((len(groups), len(directions)))
    np.add.at(sums, rows, values)
    return GroupValues(
        directions=directions,
        groups=tuple(groups.tolist()),
        values=sums,
        samples=np.bincount(rows, minlength=len(groups)).astype(np.int64),
    )
