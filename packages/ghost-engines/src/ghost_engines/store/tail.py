"""Rows that a writer keeps in memory until they fill a unit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ghost_engines.store.rows import StoredRows

_ROOM = 1 << 26
"""Bytes to make room for at once, at most, before there are as many. Memory counts when touched."""


@dataclass(frozen=True)
class Tail:
    """What comes after the units that are full on disk.

    It is never changed, only replaced, by one assignment: an interrupt finds the state before or
    after a step, and a step that is repeated writes the same shard again. Rows that are added go
    where no tail so far has any.

    Attributes:
        unit: The unit that the first of the rows opens.
        length: Number of rows.
        written: How many of them are on disk.
        settled: Whether whoever added rows knows what became of them: not while a step is under
            way, and after one that failed or was interrupted.
        memory: Room for rows, of which these are some; None if all are on disk and no writer needs
            them.
        start: Where in the memory they begin.
    """

    unit: int
    length: int = 0
    written: int = 0
    settled: bool = True
    memory: StoredRows | None = None
    start: int = 0

    @property
    def rows(self) -> StoredRows:
        """The rows, as views of the memory, in which there must be some."""
        assert self.memory is not None
        return self.memory[self.start : self.start + self.length]

    def with_rows(self, added: StoredRows, unit_size: int) -> Self:
        """Return it with rows added, which are copied from any device. It is not settled."""
        length = self.length + len(added)
        memory, start = self._with_room(added, unit_size)
        at = start + self.length
        given = added.tensors()
        for name, tensor in memory.tensors().items():
            tensor[at : at + len(added)].copy_(given[name].detach())
        return replace(self, length=length, settled=False, memory=memory, start=start)

    def _with_room(self, added: StoredRows, unit_size: int) -> tuple[StoredRows, int]:
        """Return memory with the rows and room for more after them, and where they begin."""
        length = self.length + len(added)
        memory = self.memory
        if memory is not None and not self.length and length <= self.start:
            return memory, 0  # the same memory for each unit, so that it stays in the cache
        if memory is not None and self.start + length <= len(memory):
            return memory, self.start
        if memory is None or length > self.start:  # else all fit before the rows that count now
            least = max(2 * length, _ROOM // (added.rows[:1].nbytes or 1))
            # The last batch of a unit may go beyond it, and the next unit begins there.
            memory = _room(max(length, min(unit_size + len(added), least)), added)
        if self.length:
            for name, tensor in self.rows.tensors().items():
                memory.tensors()[name][: self.length].copy_(tensor)
        return memory, 0

    def unsettled(self) -> Self:
        """Return it while a step is under way."""
        return replace(self, settled=False)

    def after(self) -> Self:
        """Return it once a step has come to its end."""
        return replace(self, settled=True)

    def written_out(self) -> Self:
        """Return it without the rows that are not on disk, and nothing in memory."""
        return type(self)(self.unit, self.written, self.written)

    def split(self, unit_size: int) -> tuple[StoredRows, Self]:
        """Return the rows of its unit, and what it is once these are on disk."""
        if self.length < unit_size:
            return self.rows, replace(self, written=self.length)
        rest = replace(
            self,
            unit=self.unit + 1,
            length=self.length - unit_size,
            written=0,
            start=self.start + unit_size,
        )
        return self.rows[:unit_size], rest


def _room(n: int, like: StoredRows) -> StoredRows:
    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(n, *tensor.shape[1:], dtype=tensor.dtype, device="cpu")

    with torch.inference_mode(False):  # what is made in it could not be written to outside of it
        return like.mapped(empty)
