"""Ids that ride in batches: of any data set, through any collator, to the model's door."""

from __future__ import annotations

from collections.abc import Iterator
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
