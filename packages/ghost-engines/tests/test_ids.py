"""Ids that ride in batches: of any data set, through any collator, to the model's door."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ghost_core import CaptureError
from ghost_engines import IdCollator, take_ids, with_ids

ROWS = [{"x": torch.tensor(float(i)), "key": 10 * i} for i in range(5)]


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from ROWS[first::step]


class Sized(Streamed):
    def __len__(self) -> int:
        return len(ROWS)


class Shuffled(IterableDataset[Any]):
    """Comes in another order each time, as a Hugging Face stream that is shuffled does."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.epoch += 1
        yield from ROWS[self.epoch :] + ROWS[: self.epoch]


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch say that there are two."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)  # loaders ask for both


def loaded(data: Any, **options: Any) -> dict[int, float]:
    """Return x by id, as a loader gives them."""
    found = {}
    for batch in DataLoader(data, batch_size=2, collate_fn=IdCollator(), **options):
        ids = take_ids(batch)
        assert ids.dtype == torch.int64
        assert "sample_id" not in batch
        for sample, x in zip(ids.tolist(), batch["x"].tolist(), strict=True):
            assert sample not in found
            found[sample] = x
    return found


def test_ids_are_positions_whatever_the_order() -> None:
    generator = torch.Generator().manual_seed(3)
    assert loaded(with_ids(ROWS), shuffle=True, generator=generator) == {i: i for i in range(5)}
    assert loaded(with_ids(Streamed())) == {i: i for i in range(5)}


def test_ids_may_come_from_the_samples() -> None:
    by_key = {10 * i: float(i) for i in range(5)}
    assert loaded(with_ids(ROWS, key=lambda row: row["key"])) == by_key
    assert loaded(with_ids(Streamed(), key=lambda row: row["key"])) == by_key


def test_a_stream_may_know_its_length() -> None:
    data: Any = with_ids(Sized())
    assert isinstance(data, IterableDataset)
    assert len(data) == 5
    assert len(DataLoader(data, batch_size=2)) == 3
    assert loaded(data) == {i: i for i in range(5)}
    assert not hasattr(with_ids(Streamed()), "__len__")


def test_positions_in_a_stream_are_those_of_this_time_and_keys_stay() -> None:
    by_position, by_key = with_ids(Shuffled()), with_ids(Shuffled(), key=lambda row: row["key"])
    assert loaded(by_position) == {0: 1, 1: 2, 2: 3, 3: 4, 4: 0}
    assert loaded(by_position) == {0: 2, 1: 3, 2: 4, 3: 0, 4: 1}
    assert loaded(by_key) == loaded(by_key) == {10 * i: i for i in range(5)}


@pytest.mark.usefixtures("two_processes")
def test_several_processes_need_a_key_for_a_stream() -> None:
    """Positions in all of a data set with items are the same in each of them."""
    with pytest.raises(
        CaptureError, match=r"one of 2 processes\nReason: .*\nRemedy: .*key="
    ) as caught:
        with_ids(Streamed())
    assert caught.value.reason
    assert caught.value.remedy
    by_key = {10 * i: float(i) for i in range(5)}
    assert loaded(with_ids(Streamed(), key=lambda row: row["key"])) == by_key
    assert loaded(with_ids(ROWS)) == {i: i for i in range(5)}


@pytest.mark.parametrize("away", [lambda data: next(iter(data)), pickle.dumps])
def test_processes_may_join_after_the_ids(
    away: Callable[[Any], Any], request: pytest.FixtureRequest
) -> None:
    """Workers that are no forks do not know of them: they are sent the data instead."""
    data = with_ids(Streamed())
    away(data)
    request.getfixturevalue("two_processes")
    with pytest.raises(CaptureError, match="one of 2 processes"):
        away(data)


@pytest.mark.stress
@pytest.mark.parametrize("form", [None, "torch"])
def test_hugging_face_data_sets(form: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"x": float(i), "key": 10 * i} for i in range(5)])
    data = data.with_format(form)
    generator = torch.Generator().manual_seed(3)
    by_position, by_key = with_ids(data), with_ids(data, key=lambda row: row["key"])
    assert loaded(by_position, shuffle=True, generator=generator) == {i: i for i in range(5)}
    assert loaded(by_key) == {10 * i: i for i in range(5)}
    assert isinstance(by_position[0]["x"], torch.Tensor if form else float)


@pytest.mark.stress
def test_hugging_face_streams() -> None:
    """Two workers read two shards: of three samples, and of two."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"x": float(i), "key": 10 * i} for i in range(5)])
    stream = data.to_iterable_dataset(num_shards=2)
    assert loaded(with_ids(stream), num_workers=2) == {0: 0, 2: 1, 4: 2, 1: 3, 3: 4}
    shuffled = stream.shuffle(seed=1, buffer_size=5)
    by_position, by_key = with_ids(shuffled), with_ids(shuffled, key=lambda row: row["key"])
    orders = []
    for epoch in range(2):
        shuffled.set_epoch(epoch)
        assert loaded(by_key, num_workers=2) == {10 * i: i for i in range(5)}
        orders.append(loaded(by_position))
    assert orders[0] != orders[1]


def test_workers_give_no_id_twice() -> None:
    found = loaded(with_ids(Streamed()), num_workers=2)
    assert sorted(found.values()) == [0, 1, 2, 3, 4]
    assert sorted(found) == [0, 1, 2, 3, 4]


def test_samples_that_are_no_dictionaries() -> None:
    pairs: Dataset[Any] = TensorDataset(torch.arange(4.0), torch.arange(4) % 2)
    loader = DataLoader(with_ids(pairs), batch_size=4, collate_fn=IdCollator())
    ids, (x, y) = next(iter(loader))
    assert ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(x, torch.arange(4.0))
    assert torch.equal(y, torch.arange(4) % 2)


def test_memory_maps_and_negative_positions() -> None:
    data: Any = with_ids(np.arange(12).reshape(4, 3))
    assert len(data) == 4
    sample = data[-1]
    assert sample.sample_id == 3
    assert sample.sample.tolist() == [9, 10, 11]


def test_another_collator_never_sees_the_ids() -> None:
    seen = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(rows)
        return {"x": torch.stack([row["x"] for row in rows])}

    data: Any = with_ids(ROWS, field="n")
    batch = IdCollator(collate, field="n")([data[1], data[4]])
    assert take_ids(batch, field="n").tolist() == [1, 4]
    assert [set(row) for row in seen] == [{"x", "key"}] * 2


@pytest.mark.parametrize(
    ("samples", "has"),
    [([{"x": 1}], "it has x"), ([torch.ones(2)], "it is no dictionary")],
)
def test_missing_ids_name_what_takes_them_away(samples: list[Any], has: str) -> None:
    with pytest.raises(CaptureError, match="remove_unused_columns=False") as caught:
        IdCollator()(samples)
    assert f"a sample has no 'sample_id': {has}" in str(caught.value)
    with pytest.raises(CaptureError, match="the batch has no 'sample_id': it has x"):
        take_ids({"x": 1})


def test_what_cannot_have_ids() -> None:
    with pytest.raises(CaptureError, match="not a int"):
        with_ids(3)
    again: Any = with_ids(with_ids(ROWS))
    with pytest.raises(CaptureError, match="have an entry 'sample_id' already"):
        again[0]
    by_name: Any = with_ids(ROWS, key=lambda row: "a name")  # type: ignore[arg-type, return-value]
    with pytest.raises(CaptureError, match="must be an integer, not 'a name'"):
        by_name[0]


def test_mistakes_with_keys_and_pairs_say_what_to_write() -> None:
    with pytest.raises(CaptureError, match=r"not 'id'(.|\n)*lambda sample: sample\['id'\]"):
        with_ids([{"id": 3}], key="id")
    batch = next(iter(DataLoader(with_ids([1.0, 2.0]), collate_fn=IdCollator())))
    with pytest.raises(CaptureError, match=r"not a tuple(.|\n)*write ids, batch = batch"):
        take_ids(batch)
    ids, batch = batch
    assert (ids.tolist(), batch.tolist()) == ([0], [1.0])
