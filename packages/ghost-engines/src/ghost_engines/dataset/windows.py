"""Consecutive samples of a data set, which are computed in batches and stored together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ghost_core import CaptureError, SampleIds
from ghost_core.batch import as_ids
from ghost_engines.dataset.batches import (
    WHOLE,
    Batches,
    Ids,
    given_ids,
    is_map_style,
    taken_apart,
)
from ghost_engines.dataset.collating import collated
from ghost_engines.dataset.packing import packed, token_count

Collate = Callable[[list[Any]], Any]
"""Makes a batch of samples without ids."""

Length = Callable[[Any], int]
"""Returns how many tokens a sample has."""

_AT_ONCE = 512


@dataclass(frozen=True)
class Window:
    """Consecutive samples.

    Attributes:
        ids: Sample ids, int64 `[n]`.
        batches: Yields their batches, with the positions in the window that each one has, int64.
    """

    ids: Tensor
    batches: Iterator[tuple[Tensor, Any]]


@dataclass(frozen=True)
class Packing:
    """How samples are put into batches.

    Attributes:
        batch_size: Samples of a batch at most; None for any number.
        tokens: Tokens of a batch at most, padding included; None for any number.
        length: Tells the tokens of a sample.
        collate: Makes a batch.
    """

    batch_size: int | None
    tokens: int | None
    length: Length
    collate: Collate

    def batches(self, samples: Sequence[Any]) -> list[list[int]]:
        """Return the positions that belong together."""
        size = len(samples) if self.batch_size is None else self.batch_size
        if self.tokens is None:
            starts = range(0, len(samples), size)
            return [list(range(at, min(at + size, len(samples)))) for at in starts]
        return packed([self.length(sample) for sample in samples], self.tokens, size)


def packing_of(
    batch_size: int | None, tokens: int | None, length: Length | None, collate: Collate | None
) -> Packing:
    """Return how samples are put into batches, with what is not given filled in."""
    return Packing(
        32 if batch_size is None and tokens is None else batch_size,
        tokens,
        token_count if length is None else length,
        collated if collate is None else collate,
    )


def window_size(unit: int) -> int:
    """Return how many samples a window has: the largest divisor of a unit up to 512.

    A unit of the store is filled by whole windows, so that one that was begun goes on as it would
    have without the interruption, bit by bit.
    """
    return next(size for size in range(min(unit, _AT_ONCE), 0, -1) if unit % size == 0)


class Windows:
    """The windows of a data set.

    Args:
        data: The data set: see `score_dataset`.
        ids: Where ids are: as there.
        packing: How samples are put into batches.
        unit: Rows of a unit of the store, which whole windows fill.
        part: Which units are wanted, `(rank, world)`: they are dealt out in turn.

    Attributes:
        total: How many samples are wanted; None if nobody knows.
        positions: Whether any sample can be asked for, by its position.
        numbered: Whether samples have no ids but their positions.

    Raises:
        CaptureError: If it is none, or batches that are given are to be packed.
    """

    def __init__(
        self,
        data: Any,
        ids: Ids,
        packing: Packing,
        unit: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._data, self._ids, self._packing = data, ids, packing
        self._unit, self._size, self._part = unit, window_size(unit), part
        samples = isinstance(data, Dataset) or is_map_style(data)
        in_batches = isinstance(data, (DataLoader, *WHOLE)) or not samples
        self.positions = not in_batches and not isinstance(data, IterableDataset)
        self._batches: Batches | None = None
        if in_batches:
            if packing.tokens is not None:
                raise CaptureError(
                    "tokens_per_batch is for samples, and the data come in batches",
                    reason=f"a {type(data).__name__} was given, whose batches are taken as they "
                    "are",
                    remedy="give a data set of samples, with a length and items or to iterate over",
                )
            self._batches = Batches(data, "data", packing.batch_size or 32)
        self._begun: Iterator[Any] | None = None
        self.total: int | None = None
        if self._batches is not None:
            self.total = self._batches.total
        elif self.positions:
            if not len(data):
                raise CaptureError("data is empty", remedy="give data with at least one sample")
            self.total = sum(len(each) for each in self._windows())
        if part != (0, 1) and not self.positions:
            raise CaptureError(
                "data cannot be dealt out to several writers",
                reason=f"samples of a {type(data).__name__} cannot be asked for by position",
                remedy="give a data set with a length and items, or let one process project it",
            )
        self.numbered = self.positions and ids is None and taken_apart(data[0])[0] is None

    def begin(self) -> None:
        """Read the first samples of data that do not say how many there are.

        They are kept for `among`, so that an iterator may give its samples once.

        Raises:
            CaptureError: If there is none, or their ids are missing or mean nothing.
        """
        if self.positions:
            return
        read: Iterator[Any] = self._stream()
        if self._batches is not None:
            read = self._batches.with_ids(self._ids)
        try:
            first = next(read)
        except StopIteration:
            raise CaptureError(
                "data is empty", remedy="give data with at least one sample"
            ) from None
        self._begun = itertools.chain([first], read)

    def among(self, wanted: Callable[[int, int], bool]) -> Iterator[Window]:
        """Yield windows, after `begin`.

        Args:
            wanted: Told the position of a window's first sample and how many it has, where any
                sample can be asked for; says whether to load it.

        Raises:
            CaptureError: If ids are missing or mean nothing.
        """
        if self.positions:
            for window in self._windows():
                if wanted(window.start, len(window)):
                    yield self._window(window.start, [self._data[at] for at in window])
            return
        assert self._begun is not None
        for found in self._begun:
            if self._batches is None:
                yield self._window(*found)
            else:
                ids, batch = found
                yield Window(ids, iter([(torch.arange(len(ids)), batch)]))

    def _stream(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield samples that are iterated over, with the position of the first of them."""
        stream, start = iter(self._data), 0
        while samples := list(itertools.islice(stream, self._size)):
            yield start, samples
            start += len(samples)

    def _windows(self) -> Iterator[range]:
        """Yield the positions of each window in the units that are wanted."""
        rank, world = self._part
        n, unit = len(self._data), self._unit
        for first in range(rank * unit, n, world * unit):
            for start in range(first, min(first + unit, n), self._size):
                yield range(start, min(start + self._size, n))

    def _window(self, start: int, samples: list[Any]) -> Window:
        taken = [taken_apart(sample) for sample in samples]
        rest = [sample for _, sample in taken]
        batches = (
            (torch.tensor(part), self._packing.collate([rest[at] for at in part]))
            for part in self._packing.batches(rest)
        )
        if self._ids is None:
            own = [number for number, _ in taken]
            has = [number is not None for number in own]
            if any(has) and not all(has):
                raise CaptureError("some samples of data have ids, and some have none")
            ids = as_ids(own) if all(has) else torch.arange(start, start + len(samples))
            return Window(ids, batches)
        return _identified(self._ids, list(batches), len(samples))


def _identified(
    where: str | Callable[[Any], SampleIds], batches: list[tuple[Tensor, Any]], n: int
) -> Window:
    """Return a window whose ids are in its batches."""
    ids = torch.empty(n, dtype=torch.int64)
    for positions, batch in batches:
        found = as_ids(given_ids(where, batch, "data"))
        if len(found) != len(positions):
            raise CaptureError(f"data: a batch of {len(positions)} samples has {len(found)} ids")
        ids[positions] = found
    return Window(ids, iter(batches))


def batch_tokens(batch: Any) -> int:
    """Return how many tokens a batch has, without padding, as far as its tensors tell."""
    if isinstance(batch, dict):
        mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
        if isinstance(mask, Tensor) and mask.device.type == "cpu":
            return int((mask != 0).sum())
        if isinstance(tokens, Tensor):
            return tokens.numel()
    return 0
