"""Sample ids that ride in batches, from a data set to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from ghost_core import CaptureError
from ghost_engines.processes import process_count

ID_FIELD: Final = "sample_id"
"""The name of the ids in samples that are dictionaries, and in batches of these."""

Key = Callable[[Any], int]
"""Returns the id of a sample."""


class WithId(NamedTuple):
    """A sample that is no dictionary, with its id."""

    sample_id: int
    sample: Any


def with_ids(
    data: Any, *, key: Key | None = None, field: str = ID_FIELD
) -> Dataset[Any] | IterableDataset[Any]:
    """Give each sample of a data set an id.

    Samples that are dictionaries get one more entry; others become `WithId(sample_id, sample)`.
    `IdCollator` makes batches of them.

    Args:
        data: A data set: with a length and items (map-style, a list, a Hugging Face `Dataset`, a
            memory-mapped array of rows), or one that is iterated over (streaming).
        key: A function that returns a sample's id. By default it is its position. Of data that is
            iterated over that is the position of this time: it names a sample only as long as the
            order stays, which that of a shuffled stream does not. In several workers of a
            `DataLoader` it is the position in the worker's own part, times the number of workers,
            plus the worker's number: no two have the same, but another number of workers gives
            other ids. Give a key for ids that stay.
        field: The name of the entry.

    Returns:
        A data set of the same kind.

    Raises:
        CaptureError: If there is nothing to iterate over, the key is no function, or if it is
            iterated over in one of several processes of torch.distributed without a key; when a
            sample is asked for, if it has an entry of this name already, or the key is no integer.
    """
    if key is not None and not callable(key):
        raise CaptureError(
            f"key must be a function that returns a sample's id, not {key!r}",
            remedy=f"for an entry of samples that are dictionaries: lambda sample: sample[{key!r}]",
        )
    # torch's streams have a __getitem__ that cannot be called: they inherit it from Dataset.
    items = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    sized = hasattr(data, "__len__")
    if items and sized:
        return _Items(data, key, field)
    if isinstance(data, Iterable):
        return (_SizedStream if sized else _Stream)(data, key, field)
    raise CaptureError(
        f"with_ids takes a data set, with items or to iterate over, not a {type(data).__name__}"
    )


class _Items(Dataset[Any]):
    def __init__(self, data: Any, key: Key | None, field: str) -> None:
        self._data, self._key, self._field = data, key, field

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        position = int(index)
        if position < 0:
            position += len(self)
        return _identified(self._data[index], position, self._key, self._field)


class _Stream(IterableDataset[Any]):
    def __init__(self, data: Iterable[Any], key: Key | None, field: str) -> None:
        self._data, self._key, self._field = data, key, field
        self._check_processes()

    def __iter__(self) -> Iterator[Any]:
        self._check_processes()  # they may have joined meanwhile
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for count, sample in enumerate(self._data):
            yield _identified(sample, first + count * step, self._key, self._field)

    def __getstate__(self) -> dict[str, Any]:
        self._check_processes()  # a loader's worker that is no fork does not know of them
        return vars(self)

    def _check_processes(self) -> None:
        if self._key is None and (processes := process_count()) > 1:
            raise CaptureError(
                f"samples of a stream have no ids in one of {processes} processes",
                reason="by default an id is the position in what this process reads; the others "
                "count from 0 as well, and the same id would mean different samples",
                remedy="give with_ids a key=... that returns a sample's own id, or a data set "
                "with items",
            )


class _SizedStream(_Stream):
    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type] # with_ids looked


def _identified(sample: Any, position: int, key: Key | None, field: str) -> Any:
    number = position if key is None else key(sample)
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise CaptureError(f"the id of a sample must be an integer, not {number!r}: see key=...")
    if not isinstance(sample, Mapping):
        return WithId(int(number), sample)
    if field in sample:
        raise CaptureError(
            f"samples have an entry {field!r} already",
            reason="with_ids would replace it",
            remedy="leave with_ids out if it is the id, or give the new entry another name with "
            "field=...",
        )
    return {**sample, field: int(number)}


class IdCollator:
    """Makes batches of samples with ids, and lets another collator make the rest.

    A batch of dictionaries has the ids as one more entry, int64 `[N]`; of other samples it is the
    pair of the ids and the batch.

    Args:
        collate: Makes a batch of samples without ids: torch's own by default, or a tokenizer's.
        field: The name of the ids.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any] = default_collate, *, field: str = ID_FIELD
    ) -> None:
        self._collate, self._field = collate, field

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Make a batch.

        Raises:
            CaptureError: If a sample has no id.
        """
        if samples and all(isinstance(sample, WithId) for sample in samples):
            ids = torch.tensor([sample.sample_id for sample in samples])
            return ids, self._collate([sample.sample for sample in samples])
        numbers, rest = [], []
        for sample in samples:
            if not isinstance(sample, Mapping) or self._field not in sample:
                raise _missing(self._field, "a sample", sample)
            numbers.append(int(sample[self._field]))
            rest.append({name: value for name, value in sample.items() if name != self._field})
        batch = self._collate(rest)
        batch[self._field] = torch.tensor(numbers)
        return batch


def take_ids(batch: MutableMapping[str, Any], *, field: str = ID_FIELD) -> Tensor:
    """Take the ids out of a batch before a model sees it; return them, int64 `[N]`.

    Raises:
        CaptureError: If there are none, or it is no dictionary.
    """
    if not isinstance(batch, MutableMapping):
        raise CaptureError(
            f"ids are taken out of a batch that is a dictionary, not a {type(batch).__name__}",
            reason="samples that are no dictionaries come as a pair of ids and the rest",
            remedy="write ids, batch = batch",
        )
    if field not in batch:
        raise _missing(field, "the batch", batch)
    ids: Tensor = batch.pop(field)
    return ids


def _missing(field: str, what: str, where: object) -> CaptureError:
    has = f"has {', '.join(map(str, where))}" if isinstance(where, Mapping) else "is no dictionary"
    return CaptureError(
        f"{what} has no {field!r}: it {has}",
        reason="data without with_ids (data to evaluate on need ids, too, where they go through "
        "the same collator), a collator other than IdCollator, or a trainer that takes away what "
        "the model's forward does not name",
        remedy="load with_ids(data), or data with such a column, with collate_fn=IdCollator(...); "
        "for Hugging Face's Trainer set TrainingArguments(remove_unused_columns=False)",
    )
