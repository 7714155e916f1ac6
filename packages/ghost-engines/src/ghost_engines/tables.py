"""Tables: columns by name, for pandas and for files."""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ghost_core import UnknownNameError
from ghost_engines.extras import needed
from ghost_engines.files import write_atomically

if TYPE_CHECKING:
    import pandas

Columns = dict[str, np.ndarray]
"""Numbers by the name of their column, `[N]` each."""


class Table(ABC):
    """Something with a row of numbers for each sample."""

    @abstractmethod
    def columns(self) -> Columns:
        """Return the columns in their order, `[N]` each."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with these columns.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return _pandas("to_pandas()").DataFrame(self.columns())

    def to_csv(self, path: str | Path) -> None:
        """Write a file with the columns' names in its first line.

        Numbers are written so that reading them gives them back, those that are not finite as
        `nan`, `inf` and `-inf`.

        Raises:
            OSError: If that fails; a file that was there before still is.
        """
        _write(Path(path), _csv(self))

    def to_jsonl(self, path: str | Path) -> None:
        """Write a file with a JSON object for each row; numbers that are not finite are null.

        Raises:
            OSError: If that fails; a file that was there before still is.
        """
        _write(Path(path), _jsonl(self))

    def to_parquet(self, path: str | Path) -> None:
        """Write a Parquet file.

        Raises:
            MissingExtraError: If pandas or pyarrow is not installed.
            OSError: If that fails; a file that was there before still is.
        """
        _write(Path(path), _parquet(self))


_WRITERS: dict[str, Callable[[Table], bytes]]


def check_file(path: Path) -> None:
    """Raise if a table cannot be written to a file, before hours of work are done for it.

    Raises:
        UnknownNameError: If its name does not end as that of a kind of file that is known.
        MissingExtraError: If a library for it is not installed.
        OSError: If its folder is not there.
    """
    if path.suffix not in _WRITERS:
        raise UnknownNameError("kind of file", path.suffix, _WRITERS, f"It is the end of {path}.")
    if path.suffix == ".parquet":
        _pandas(str(path))
        pyarrow_for(str(path))
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise if the folder of a file to write is not there.

    Raises:
        FileNotFoundError: If it is not.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")


def write_table(table: Table, path: Path) -> None:
    """Write a table to a file of the kind that its name ends with.

    Raises:
        UnknownNameError: If there is no such kind.
        MissingExtraError: If a library for it is not installed.
        OSError: If that fails; a file that was there before still is.
    """
    check_file(path)
    _write(path, _WRITERS[path.suffix](table))


def extremes(values: np.ndarray, count: int, *, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the highest values, and of the lowest.

    Args:
        values: `[N]`. What is not finite is in neither.
        count: How many of each.
        signed: Whether the highest must be above zero, and the lowest below it.

    Returns:
        Both with the most extreme first; equal values in the order of their positions.
    """
    finite = np.flatnonzero(np.isfinite(values))
    lowest = finite[np.argsort(values[finite], kind="stable")]
    highest = finite[np.argsort(-values[finite], kind="stable")]
    if signed:
        lowest, highest = lowest[values[lowest] < 0], highest[values[highest] > 0]
    return highest[:count], lowest[:count]


def _write(path: Path, data: bytes) -> None:
    check_folder(path)
    write_atomically(path.absolute(), data, path.absolute().parent)


def _rows(table: Table) -> tuple[list[str], list[tuple[Any, ...]]]:
    columns = table.columns()
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return list(columns), list(rows)


def _csv(table: Table) -> bytes:
    names, rows = _rows(table)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    return text.getvalue().encode()


def _jsonl(table: Table) -> bytes:
    names, rows = _rows(table)
    return "".join(
        json.dumps(dict(zip(names, map(_json_number, row), strict=True))) + "\n" for row in rows
    ).encode()


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parquet(table: Table) -> bytes:
    pyarrow_for("to_parquet()")
    found: bytes = table.to_pandas().to_parquet(None, engine="pyarrow", index=False)
    return found


_WRITERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


def _pandas(purpose: str) -> Any:
    return needed("pandas", "pandas", purpose)


def pyarrow_for(purpose: str) -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet.

    Args:
        purpose: What needs them, for the error.

    Raises:
        MissingExtraError: If it is not installed.
    """
    return needed("pyarrow", "parquet", purpose), needed("pyarrow.parquet", "parquet", purpose)
