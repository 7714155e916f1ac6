"""A progress bar that shows itself only to a person who would wait."""

from __future__ import annotations

from typing import Any, Self

from torch import distributed
from tqdm import tqdm

_PATIENCE = 1.0  # seconds


class Progress:
    """A bar over a number of rows, with the time that is left.

    Args:
        total: Number of rows; None if nobody knows.
        title: What is going on.
        show: Whether to show it. By default on rank 0, if the standard error stream is a terminal
            and the work takes more than a second.
        unit: What the rows are.
    """

    def __init__(self, total: int | None, title: str, show: bool | None, unit: str = "row") -> None:
        hidden: bool | None = None if show is None else not show
        if show is None and distributed.is_available() and distributed.is_initialized():
            hidden = True if distributed.get_rank() else None
        self._bar: Any = tqdm(
            total=total,
            desc=title,
            unit=unit,
            unit_scale=True,
            disable=hidden,
            delay=0.0 if show else _PATIENCE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, rows: int) -> None:
        """Count rows as done."""
        self._bar.update(rows)
