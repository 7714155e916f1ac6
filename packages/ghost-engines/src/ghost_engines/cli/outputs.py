"""Numbers by sample for a person: the most helpful and the most harmful; files and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.tables import print_table
from ghost_engines.plots import check_picture
from ghost_engines.tables import Table, check_file, extremes, write_table


def check_outputs(top: int, out: Path | None, plot: Path | None) -> None:
    """Refuse what cannot be written, before the work is done.

    Raises:
        CommandError: If `top` is no number of samples.
        UnknownNameError: If a file's kind is unknown.
        MissingExtraError: If a library for it is not installed.
        OSError: If its folder is not there.
    """
    if top < 1:
        raise CommandError(f"--top must be at least 1, not {top}")
    if out is not None:
        check_file(out)
    if plot is not None:
        check_picture(plot)


def write_outputs(
    table: Table, draw: Callable[[Path], object], out: Path | None, plot: Path | None
) -> None:
    """Write a table, and draw a picture, where files are given for them.

    Raises:
        OSError: If that fails; files that were there before still are.
    """
    if out is not None:
        write_table(table, out)
    if plot is not None:
        draw(plot)


def print_extremes(
    ids: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    beside: Mapping[str, np.ndarray],
    *,
    what: str,
    top: int,
    signed: bool,
) -> None:
    """Print the highest and lowest values of each column.

    Args:
        ids: Sample ids, `[N]`.
        values: `[N, K]`.
        names: Names of the K columns.
        beside: What else to print of a sample, `[N]` by title.
        what: What the values are.
        top: How many of each.
        signed: Whether positive means helpful, and negative harmful.
    """
    print()
    print_table(
        ("of", "which", "sample", what, *beside),
        _ends(ids, values, names, list(beside.values()), top, signed),
    )
    if wrong := int((~np.isfinite(values)).any(1).sum()):
        print(f"\n{wrong} of {len(ids)} samples have a {what} that is not finite")


def _ends(
    ids: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    beside: Sequence[np.ndarray],
    top: int,
    signed: bool,
) -> Iterator[tuple[str, ...]]:
    words = ("most helpful", "most harmful") if signed else ("highest", "lowest")
    for at, name in enumerate(names):
        for which, rows in zip(words, extremes(values[:, at], top, signed=signed), strict=True):
            for row in rows:
                others = (f"{column[row]:.6g}" for column in beside)
                yield (name, which, str(ids[row]), f"{values[row, at]:.6g}", *others)
