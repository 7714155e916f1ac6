"""All rows of a store in memory, with their lengths, for many searches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ghost_engines.progress import Progress
from ghost_engines.store.rows import StoredRows

_AT_ONCE = 1 << 25
"""Bytes of rows that are looked at together, at most, where no more than a block is scored."""


@dataclass(frozen=True)
class HeldRows:
    """The rows of a store.

    Attributes:
        rows: All rows in order, with their ids and nothing else.
        lengths: What they are long, as sums in float32 say, `[N]`.
        longest: The largest of these.
    """

    rows: StoredRows
    lengths: Tensor
    longest: float

    @classmethod
    def of(
        cls,
        blocks: Iterable[StoredRows],
        shape: tuple[int, int],
        dtype: torch.dtype,
        progress: bool | None,
    ) -> Self:
        """Return the rows of blocks, which are copied.

        Args:
            blocks: All rows, in order.
            shape: How many they are, and of how many columns.
            dtype: Of which dtype.
            progress: Whether to show a progress bar.
        """
        n, _ = shape
        rows = torch.empty(shape, dtype=dtype, device="cpu")
        ids = torch.empty(n, dtype=torch.int64, device="cpu")
        lengths = torch.empty(n, dtype=torch.float32, device="cpu")
        start = 0
        with torch.no_grad(), Progress(n, "reading", progress) as bar:
            for block in blocks:
                place = slice(start, start + len(block))
                ids[place], rows[place] = block.ids, block.rows
                torch.linalg.vector_norm(block.rows.float(), dim=1, out=lengths[place])
                start = place.stop
                bar.advance(len(block))
        return cls(StoredRows(ids, rows), lengths, lengths.max().item() if n else 0.0)

    def blocks(self, size: int) -> Iterator[StoredRows]:
        """Yield all rows in order, as views, so many at once."""
        for start in range(0, len(self.rows), size):
            yield self.rows[start : start + size]

    def growing(self, size: int) -> Iterator[StoredRows]:
        """Yield them so many at first, and then more and more at once."""
        start, most = 0, max(size, _AT_ONCE // (self.rows.rows[:1].nbytes or 1))
        while start < len(self.rows):
            yield self.rows[start : start + size]
            start, size = start + size, min(2 * size, most)
