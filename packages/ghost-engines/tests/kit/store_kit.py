"""A store of rows that are known by their ordinals."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ghost_engines.store import GradientStore, StoredRows

K = 6

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass
class FakeEngine:
    dtype: torch.dtype = torch.float32
    k_total: int = K
    seed: int = 42
    layers: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"name": "a.weight", "shape": (2, 3), "offset": 0, "k_left": 1, "k_right": 2},
            {"name": "b.weight", "shape": (4, 3), "offset": 2, "k_left": 2, "k_right": 2},
        ]
    )

    def manifest(self) -> dict[str, Any]:
        return {
            "projection": "gaussian",
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "verified": True,
            "layers": self.layers,
        }


def batch(start: int, stop: int, dtype: torch.dtype = torch.float32) -> StoredRows:
    """Return the rows that every store here has at these ordinals."""
    ordinals = torch.arange(start, stop)
    rows = (ordinals[:, None] * K + torch.arange(K)) % 256 - 100  # exact in every dtype
    return StoredRows(ordinals * 3 + 1, rows.to(dtype), None)


def fill(store: GradientStore, stop: int, step: int = 5, with_loss: bool = False) -> None:
    for start in range(len(store), stop, step):
        rows = batch(start, min(start + step, stop), store.dtype)
        store.append(rows, loss=rows.ids / 7 if with_loss else None)


def assert_holds(store: GradientStore, n: int) -> None:
    expected = batch(0, n, store.dtype)
    assert len(store) == n
    assert torch.equal(store.ids, expected.ids)
    assert store.rows().dtype == store.dtype
    assert torch.equal(store.rows(), expected.rows)


def files(root) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def make(root, n: int, unit: int = 4, with_loss: bool = False, **given: Any) -> GradientStore:
    with GradientStore.create(root, FakeEngine(), unit=unit, **given) as store:
        fill(store, n, with_loss=with_loss)
    return store
