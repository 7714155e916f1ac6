"""Records of a corpus: lines of a file, rows of a table, items of a data set on disk."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ghost_core.errors import told
from ghost_engines.corpus.errors import CorpusError
from ghost_engines.extras import needed
from ghost_engines.files import check_waits_for_nobody
from ghost_engines.tables import pyarrow_for

TEXT: Final = "text"
"""The field that a line of a text file is under."""

_MARK = b"\xef\xbb\xbf"
"""Stands at the start of some files in UTF-8, and is no text."""

_DATASETS = ("dataset_info.json", "dataset_dict.json")
"""What tells a folder with a data set of Hugging Face's, or with several."""


class NoRecordError(CorpusError):
    """A line of JSON is no object."""


class Records(ABC):
    """Records by position: mappings of fields.

    Attributes:
        path: The file or folder.
    """

    path: Path

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return a record.

        Raises:
            CorpusError: If it cannot be read.
        """

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Where records begin and end, in bytes of the file, int64 `[n]`; None if nobody knows."""
        return None

    @property
    def files(self) -> list[Path]:
        """The files that they are read from."""
        return [self.path]

    def called(self, index: int) -> str:
        """Return what a record is called in errors."""
        return f"record {index + 1} of {self.path}"


class _Lines(Records):
    """The lines of a file that are not blank, which are read when they are asked for."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path = path
        begins, ends = [], []
        try:
            opened = path.open("rb")
        except ValueError as error:  # a name that no file can have
            raise CorpusError(f"{path} cannot be read: {error}") from error
        with opened as file:
            at = 0
            for line in file:
                start = at + (len(_MARK) if at == 0 and line.startswith(_MARK) else 0)
                at += len(line)
                if line[start - at :].strip():
                    begins.append(start)
                    ends.append(at)
                    if limit is not None and len(begins) == limit:
                        break
        self._begins, self._ends = (np.array(each, dtype=np.int64) for each in (begins, ends))

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where lines begin and end, in bytes."""
        return self._begins, self._ends

    def called(self, index: int) -> str:
        """Return what a line is called: blank ones do not count."""
        return f"text {index + 1} of {self.path}"

    def line(self, index: int) -> str:
        """Return a line, without its end.

        Raises:
            CorpusError: If it is not UTF-8.
            OSError: If it cannot be read.
        """
        begin, end = int(self._begins[index]), int(self._ends[index])
        with self.path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        try:
            return data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self.path} is not UTF-8: {error}") from error


class TextLines(_Lines):
    """A file of texts, one a line: records with the field `text`."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return a line."""
        return {TEXT: self.line(index)}


class JsonLines(_Lines):
    """A file with an object of JSON in each line."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return an object.

        Raises:
            NoRecordError: If it is none.
        """
        try:
            found = json.loads(self.line(index))
        except (ValueError, RecursionError) as error:
            if isinstance(error, CorpusError):
                raise
            raise NoRecordError(f"{self.called(index)} is no JSON object") from error
        if not isinstance(found, dict):
            raise NoRecordError(f"{self.called(index)} is no JSON object")
        return found


class ParquetRows(Records):
    """The rows of a Parquet file; one group of rows is held in memory at a time."""

    def __init__(self, path: Path) -> None:
        pyarrow, parquet = pyarrow_for(str(path))
        self.path = path
        try:
            self._file: Any = parquet.ParquetFile(path, memory_map=True)
        except pyarrow.ArrowException as error:
            raise CorpusError(f"{path} is no Parquet file: {told(error)}") from error
        groups = range(self._file.num_row_groups)
        sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return a row."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        if self._held[0] != group:
            self._held = (group, self._file.read_row_group(group))
        table = self._held[1]
        start = int(self._ends[group]) - table.num_rows
        found: dict[str, Any] = table.slice(index - start, 1).to_pylist()[0]
        return found


class SavedItems(Records):
    """The items of a data set that Hugging Face's `save_to_disk` wrote."""

    def __init__(self, path: Path) -> None:
        datasets = needed("datasets", "datasets", str(path))
        self.path = path
        try:
            self._items: Any = datasets.load_from_disk(str(path))
        except Exception as error:  # a damaged one fails in many ways
            raise CorpusError(f"{path} cannot be read as a data set: {told(error)}") from error
        if not isinstance(self._items, datasets.Dataset):
            raise CorpusError(
                f"{path} has several data sets: {', '.join(self._items)}",
                remedy="give the folder of one of them",
            )

    def __len__(self) -> int:
        return len(self._items)

    @property
    def files(self) -> list[Path]:
        """The files of its table."""
        return sorted(self.path.glob("*.arrow"))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return an item."""
        found: dict[str, Any] = self._items[index]
        return found


SUFFIXES: Sequence[str] = (".txt", ".jsonl", ".parquet")
"""Kinds of files that records are read from."""


def open_records(path: Path, limit: int | None = None) -> Records | None:
    """Open a file of texts (.txt, .jsonl, .parquet), or the folder of a data set on disk.

    Args:
        path: The file or folder.
        limit: How many lines to look for at most.

    Returns:
        Its records; None if it is of no kind that is known.

    Raises:
        CorpusError: If it cannot be read as what its name says.
        MissingExtraError: If a library for it is not installed.
        OSError: If it cannot be read.
    """
    check_waits_for_nobody(path)
    match path.suffix:
        case ".txt":
            return TextLines(path, limit)
        case ".jsonl":
            return JsonLines(path, limit)
        case ".parquet":
            return ParquetRows(path)
    saved = any((path / name).is_file() for name in _DATASETS)
    return SavedItems(path) if saved else None
