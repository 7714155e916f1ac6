"""A progress bar that shows itself only to a person who would wait."""

from __future__ import annotations

import time
from typing import Any, Self

from tqdm import tqdm

from ghost_engines.processes import process_rank

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
        if show is None and process_rank() > 0:
            hidden = True
        self._tokens, self._started = 0, time.monotonic()
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

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Count rows as done, and tokens, of which a bar shows how many there are in a second."""
        self._tokens += tokens
        if self._tokens and not self._bar.disable:
            rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
            self._bar.set_postfix_str(f"{tqdm.format_sizeof(rate)} tokens/s", refresh=False)
        self._bar.update(rows)
