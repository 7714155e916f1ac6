"""The texts of a domain, from whatever kind of file they are in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ghost_core import UnknownNameError
from ghost_engines import CorpusError
from ghost_engines.corpus import TEXT, open_records

_PART = 1 << 20
_TEXT = (".txt", ".md", ".rst", ".py")


@dataclass(frozen=True)
class Source:
    """A file, or a data set on disk, whose texts are a domain.

    Attributes:
        domain: Name of the domain.
        path: The file or folder.
    """

    domain: str
    path: Path

    @classmethod
    def of(cls, given: str) -> Source:
        """Return what `domain=path` says, or a path, whose name is then that of the domain.

        Raises:
            CorpusError: If there is no such file.
        """
        domain, equals, place = given.partition("=")
        path = Path(place if equals else given)
        if not path.exists():
            raise CorpusError(f"there is no {path}", remedy="give DOMAIN=PATH, or a path")
        return cls(domain if equals else path.stem, path)

    @property
    def is_one_text(self) -> bool:
        """Whether it is one long text, and not one of many documents."""
        return self.path.suffix in _TEXT

    def texts(self, field: str = TEXT) -> Iterator[str]:
        """Yield its documents, or the parts of its one text.

        Args:
            field: What the text is under, in records.

        Raises:
            CorpusError: If it is of no kind that is known, or a record has no text.
            UnknownNameError: If a record has no such field.
            MissingExtraError: If a library for it is not installed.
        """
        if self.is_one_text:
            yield from self._parts()
            return
        records = open_records(self.path)
        if records is None:
            raise CorpusError(
                f"{self.path} is of no kind that is known",
                remedy=f"give a text ({', '.join(_TEXT)}), documents (.jsonl, .parquet), or the "
                "folder of a data set that save_to_disk has written",
            )
        for at in range(len(records)):
            record = records[at]
            if field not in record:
                raise UnknownNameError("field", field, record, f"It is {records.called(at)}.")
            if not isinstance(record[field], str):
                kind = type(record[field]).__name__
                raise CorpusError(f"{records.called(at)} has no text in {field!r}: it is a {kind}")
            yield record[field]

    def _parts(self) -> Iterator[str]:
        """Yield the lines of a text, many at a time."""
        try:
            with self.path.open(encoding="utf-8") as file:
                while lines := file.readlines(_PART):
                    yield "".join(lines)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self.path} is not UTF-8: {error}") from error
