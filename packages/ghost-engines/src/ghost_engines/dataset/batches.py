"""Batches of any data set, each with the ids of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
)

from ghost_core import CaptureError, SampleIds
from ghost_core.batch import as_ids
from ghost_engines.ids import ID_FIELD, WithId

Ids = str | Callable[[Any], SampleIds] | None
"""Where the ids of a batch are: under a key of it, in what a function returns for it; None for
those that `with_ids` gave to samples, else to number the samples from 0."""

WHOLE = (Tensor, Mapping, tuple)
"""What is one batch of all samples."""


class Batches:
    """The batches of a data set.

    Args:
        data: Samples, which are batched here: a map-style data set (`__getitem__` and `__len__`) or
            an `IterableDataset`; one batch of all samples, which is cut: a tensor, a mapping or a
            tuple; or batches: a `DataLoader`, a list, or any other iterable.
        what: What it is called, for errors.
        batch_size: Samples in a batch, where they are batched here.

    Attributes:
        total: How many samples there are; None if nobody knows yet.

    Raises:
        CaptureError: If it is none of these.
    """

    def __init__(self, data: Any, what: str, batch_size: int) -> None:
        self.what = what
        self._data = data
        self._batches: Iterable[Any]
        if isinstance(data, DataLoader):
            self._batches = data
            self.total = None if isinstance(data.dataset, IterableDataset) else _length(data)
        elif isinstance(data, WHOLE):
            self.total = self.size(data)
            starts = range(0, self.total, batch_size)
            self._batches = (_slice(data, slice(at, at + batch_size)) for at in starts)
        elif isinstance(data, Dataset) or is_map_style(data):
            # A generator of its own: the loader draws a number for its workers.
            self._batches = DataLoader(data, batch_size=batch_size, generator=torch.Generator())
            self.total = None if isinstance(data, IterableDataset) else len(data)
        elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
            self._batches = data
            self.total = _total(data) if isinstance(data, list) else None
        else:
            raise CaptureError(
                f"{what} is of type {type(data).__name__}",
                reason="samples are read from a data set, a DataLoader, or an iterable of batches",
                remedy="give one of these, or a list with the one batch that there is",
            )

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches as losses get them: without ids that `with_ids` gave to samples.

        Raises:
            CaptureError: If there is none.
        """
        for batch in self._raw():
            yield taken_apart(batch)[1]

    def with_ids(self, ids: Ids) -> Iterator[tuple[Tensor, Any]]:
        """Yield the batches with the ids of their samples, int64 `[N]`.

        Raises:
            CaptureError: If there is no batch, or ids are missing, or mean nothing.
        """
        start = 0
        for raw in self._raw():
            found, batch = self._identified(raw, ids, start)
            if not len(found):
                raise CaptureError(
                    f"{self.what}: a batch after {start} samples is empty",
                    remedy="leave batches without samples out",
                )
            start += len(found)
            yield found, batch

    def _identified(self, raw: Any, ids: Ids, start: int) -> tuple[Tensor, Any]:
        if ids is not None:
            return as_ids(given_ids(ids, raw, self.what)), raw
        own, batch = taken_apart(raw)
        if own is not None:
            return as_ids(own), batch
        self._check_order()
        return torch.arange(start, start + self.size(batch)), batch

    def _raw(self) -> Iterator[Any]:
        empty = True
        for batch in self._batches:
            empty = False
            yield batch
        if empty:
            raise CaptureError(
                f"{self.what} is empty",
                reason="it gave no batch; an iterator gives its batches once",
                remedy="give data with at least one sample, and a new iterator each time",
            )

    def size(self, batch: Any) -> int:
        """Return the number of samples of a batch: the leading size of all that is in it.

        Raises:
            CaptureError: If sizes differ, or there are none.
        """
        sizes = sorted(set(_sizes(batch)))
        if len(sizes) == 1:
            return sizes[0]
        listed = ", ".join(map(str, sizes)) or "none"
        raise CaptureError(
            f"{self.what}: a batch of type {type(batch).__name__} does not tell how many samples "
            "it has",
            reason=f"the sizes of its parts on their first axes are {listed}",
            remedy="give batches, in a list or a DataLoader, and say which samples a batch has "
            "with ids=..., a function of the batch that returns one integer per sample",
        )

    def _check_order(self) -> None:
        """Refuse to number samples that come in another order than that of the data set."""
        loader = self._data
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        in_order = isinstance(loader.sampler, SequentialSampler)
        if not in_order or type(loader.batch_sampler) not in (BatchSampler, type(None)):
            raise CaptureError(
                f"{self.what}: the loader does not go through its data set in order",
                reason="running numbers would not be the positions of the samples in it",
                remedy="make it with shuffle=False, or say which samples a batch has with ids=...",
            )


def given_ids(where: str | Callable[[Any], SampleIds], batch: Any, what: str) -> Any:
    """Return the ids of a batch's samples: under a key of it, or what a function returns.

    Args:
        where: The key or the function.
        batch: The batch.
        what: What the data are called, for errors.

    Raises:
        CaptureError: If there is no such key.
    """
    if not isinstance(where, str):
        return where(batch)
    if not isinstance(batch, Mapping) or where not in batch:
        kind = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise CaptureError(
            f"{what}: a batch has no ids under {where!r}",
            reason=f"it is a {type(batch).__name__} {kind}".rstrip(),
            remedy="name one of its keys, or give a function of the batch: ids=lambda batch: "
            "...; without ids samples are numbered from 0",
        )
    return batch[where]


def taken_apart(batch: Any) -> tuple[Any, Any]:
    """Return the ids that `with_ids` gave to samples, None if it did not, and their batch.

    It takes one sample apart as it does a batch.
    """
    if isinstance(batch, WithId):
        return batch.sample_id, batch.sample
    if isinstance(batch, dict) and ID_FIELD in batch:
        rest = dict(batch)
        return rest.pop(ID_FIELD), rest
    return None, batch


def is_map_style(data: Any) -> bool:
    """Tell whether data have a length and items, and are no list of batches."""
    listed = isinstance(data, list | str | bytes)
    return not listed and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _length(loader: DataLoader[Any]) -> int | None:
    dataset: Any = loader.dataset
    return len(dataset) if hasattr(dataset, "__len__") else None


def _total(batches: list[Any]) -> int | None:
    sizes = [set(_sizes(batch)) for batch in batches]
    return sum(map(sum, sizes)) if all(len(size) == 1 for size in sizes) else None


def _sizes(part: Any) -> Iterator[int]:
    """Yield the leading sizes of all that has one."""
    if isinstance(part, Tensor | np.ndarray):
        if part.ndim:
            yield part.shape[0]
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from _sizes(value)
    elif isinstance(part, Sequence) and not isinstance(part, str | bytes):
        nested = [size for value in part for size in _sizes(value)]
        yield from nested or [len(part)]


def _slice(part: Any, rows: slice) -> Any:
    """Return some samples of a batch."""
    if isinstance(part, Tensor | np.ndarray):
        return part[rows] if part.ndim else part
    if isinstance(part, Mapping):
        pieces = {key: _slice(value, rows) for key, value in part.items()}
        return pieces if type(part) is dict else type(part)(pieces)  # type: ignore[call-arg]
    if isinstance(part, Sequence) and not isinstance(part, str | bytes):
        if any(True for value in part for _ in _sizes(value)):
            sliced = [_slice(value, rows) for value in part]
            return type(part)(*sliced) if hasattr(part, "_fields") else type(part)(sliced)  # type: ignore[call-arg]
        return part[rows]
    return part
