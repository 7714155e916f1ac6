"""What the columns of values are called in tables."""

from __future__ import annotations

from ghost_engines.tables import Columns
from ghost_engines.values.sums import Floats


def value_columns(values: Floats, directions: tuple[str, ...]) -> Columns:
    """Return the columns of values `[S, K]`: `value`, or `value_NAME` for each of several."""
    single = len(directions) == 1
    names = ["value" if single else f"value_{name}" for name in directions]
    return {name: values[:, at] for at, name in enumerate(names)}
