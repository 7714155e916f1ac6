"""Stores of given rows, and what searches in them must find."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_engines.store import GradientStore, StoredRows

BLOCKS = {"a.weight": 3, "b.0.weight": 4, "b.1.weight": 2, "c.weight": 3}
"""Columns of each parameter."""

PLACES = {"a.weight": (0, 3), "b.0.weight": (3, 7), "b.1.weight": (7, 9), "c.weight": (9, 12)}

K = 12


@dataclass
class Rows:
    """An engine in name only."""

    dtype: torch.dtype = torch.float32
    k_total: int = K
    seed: int = 0

    def manifest(self) -> dict[str, Any]:
        layers = [{"name": name, "offset": start} for name, (start, _) in PLACES.items()]
        return {"seed": self.seed, "layers": layers if self.k_total == K else []}


def stored(path: Path, rows: Tensor, unit: int = 16, seed: int = 0, **given: Any) -> GradientStore:
    """Store rows of the samples 7, 17, 27, ... and open the store."""
    engine = Rows(rows.dtype, rows.shape[1], seed)
    with GradientStore.create(path, engine, unit=unit, **given) as made:
        made.append(StoredRows(torch.arange(len(rows)) * 10 + 7, rows, None))
    return GradientStore.open(path)


def columns_of(*names: str) -> list[int]:
    return [column for name in names for column in range(*PLACES[name])]


def best_of(scores: Tensor, k: int, sign: int = 1) -> Tensor:
    """Return ordinals `[Q, k]`, best first, of equal scores the lower ordinal first."""
    return torch.tensor(
        [sorted(range(len(row)), key=lambda at: (-sign * row[at], at))[:k] for row in
         scores.tolist()]
    )  # fmt: skip


def whitened(
    rows: Tensor,
    queries: Tensor,
    damping: float,
    groups: list[list[int]],
    searched: Tensor | None = None,
) -> Tensor:
    """Return ⟨q, (C + λI)⁻¹ r⟩ in float64, block by block, by the inverse itself."""
    rows, queries = rows.double(), queries.double()
    others = rows if searched is None else searched.double()
    total = torch.zeros(len(queries), len(others), dtype=torch.float64)
    for columns in groups:
        part = rows[:, columns]
        moments = sum(torch.outer(row, row) for row in part) / len(part)
        level = damping * torch.linalg.eigvalsh(moments).mean()
        inverse = torch.linalg.inv(moments + level * torch.eye(len(columns), dtype=torch.float64))
        total += queries[:, columns] @ inverse @ others[:, columns].T
    return total
