"""A store of rows that are known by their ordinals, for writers that fail or are killed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghost_engines.store import GradientStore, StoredRows

K = 5

UNIT = 16

TOTAL = 41

STEPS = ("open", "write", "fsync", "replace", "mkdir")
"""The functions of `os` that a write is made of."""


@dataclass
class FakeEngine:
    k_total: int = K
    dtype: torch.dtype = torch.float32

    def manifest(self) -> dict[str, Any]:
        return {"seed": 3}


def batch(start: int, stop: int) -> StoredRows:
    ordinals = torch.arange(start, stop)
    rows = ordinals[:, None] * 10 + torch.arange(K)
    return StoredRows(ordinals * 3 + 1, rows.float(), ordinals / 2)


def append(store: GradientStore, stop: int) -> None:
    rows = batch(len(store), stop)
    store.append(rows, loss=rows.loss)


def assert_holds_exactly(store: GradientStore, n: int) -> None:
    expected = batch(0, n)
    assert len(store) == store.committed == n
    assert torch.equal(store.ids, expected.ids)
    assert torch.equal(store.rows(), expected.rows)
    assert store.losses is None or torch.equal(store.losses, expected.loss)
    store.verify()


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if "tmp" in path.name]
