"""The rows at the end of a store that is being written: less than a unit, once all is well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ghost_engines.store.format import StoredRows, concatenate


@dataclass(frozen=True)
class Tail:
    """What comes after the units that are full on disk.

    It is never changed, only replaced, by one assignment: an interrupt finds the state before or
    after a step, and a step that is repeated writes the same shard again.

    Attributes:
        unit: The unit that the first of the rows opens.
        length: Number of rows.
        written: How many of them are on disk.
        parts: The rows as they were appended; nothing if all are on disk and no writer needs them.
    """

    unit: int
    length: int = 0
    written: int = 0
    parts: tuple[StoredRows, ...] = ()

    def with_rows(self, rows: StoredRows) -> Self:
        """Return it with rows added."""
        length = self.length + len(rows)
        return type(self)(self.unit, length, self.written, (*self.parts, rows))

    def written_out(self) -> Self:
        """Return it without the rows that are not on disk, and nothing in memory."""
        return type(self)(self.unit, self.written, self.written)

    def split(self, unit_size: int) -> tuple[StoredRows, Self]:
        """Return the rows of its unit, and what it is once these are on disk."""
        rows = concatenate(self.parts)
        head, rest = rows[:unit_size], rows[unit_size:]
        if len(head) < unit_size:
            return head, type(self)(self.unit, len(head), len(head), (head,))
        if len(rest) < unit_size:
            rest = rest.copy()  # a view would keep the whole unit in memory
        return head, type(self)(self.unit + 1, len(rest), 0, (rest,) if len(rest) else ())
