"""Where the rows of a store are: which shard has which ordinals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ghost_engines.store.parts import Part
from ghost_engines.store.shards import Shard


@dataclass(frozen=True, slots=True)
class Slot:
    """Some consecutive ordinals, and the shard that has their rows.

    Attributes:
        part: The part of the store that the shard belongs to.
        unit: The shard's unit.
        first: The ordinal of the first row.
        size: Number of rows in the shard, or at least that.
        kept: Which of them count, int64; None for all.
    """

    part: Part
    unit: int
    first: int
    size: int
    kept: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of rows that count."""
        return self.size if self.kept is None else len(self.kept)

    def rows(self, part: slice) -> slice | Tensor:
        """Return where in the shard some of the rows that count are."""
        return part if self.kept is None else self.kept[part]


def interleaved(parts: Iterable[tuple[Part, Sequence[Shard]]]) -> list[Slot]:
    """Return the shards of all parts, the first unit of each before the second of any.

    Where units of data are dealt out in turn, that is the order of the data.
    """
    found = [
        (unit, part.name, Slot(part, unit, 0, shard.n))
        for part, shards in parts
        for unit, shard in enumerate(shards)
    ]
    return numbered(slot for *_, slot in sorted(found, key=lambda each: each[:2]))


def numbered(slots: Iterable[Slot]) -> list[Slot]:
    """Return slots with the ordinals that they have one after the other."""
    found, first = [], 0
    for slot in slots:
        found.append(replace(slot, first=first))
        first += slot.n
    return found


def latest(slots: Sequence[Slot], ids: Tensor) -> list[Slot]:
    """Return slots without the rows of samples that later rows replace.

    Args:
        slots: All rows, in order.
        ids: Their samples' ids.
    """
    found = np.unique(ids.numpy()[::-1], return_index=True)[1]
    counts = torch.zeros(len(ids), dtype=torch.bool)
    counts[len(ids) - 1 - torch.from_numpy(found)] = True
    kept = []
    for slot in slots:
        mask = counts[slot.first : slot.first + slot.n]
        kept.append(slot if mask.all() else replace(slot, kept=mask.nonzero().flatten()))
    return numbered(kept)
