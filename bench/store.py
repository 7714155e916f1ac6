"""The store of rows: writing them, opening many shards, and exact search, beside plain numpy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.case import Case, Setting, Way
from ghost_engines import GradientStore
from ghost_engines.store import StoredRows

COLUMNS = 256
WRITTEN = 262_144
SEARCHED = 1_000_000
"""Rows."""


@dataclass(frozen=True)
class Engine:
    """An engine in name only: what a store must know of one."""

    k_total: int = COLUMNS
    dtype: torch.dtype = torch.float16

    def manifest(self) -> dict[str, Any]:
        """Return nothing, as no gradient is projected."""
        return {}


def folder(setting: Setting) -> Path:
    """Return a folder that is removed after the case; in memory, where the system offers that."""
    memory = Path("/dev/shm")
    made = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
    setting.stack.callback(shutil.rmtree, made)
    return Path(made)


def filled(path: Path, rows: torch.Tensor, unit: int) -> GradientStore:
    """Make a store of rows, in batches of 1024, and open it."""
    with GradientStore.create(path, Engine(rows.shape[1], rows.dtype), unit=unit) as store:
        for start in range(0, len(rows), 1024):
            part = rows[start : start + 1024]
            store.append(StoredRows(torch.arange(start, start + len(part)), part, None))
    return GradientStore.open(path)


def writing(setting: Setting) -> Mapping[str, Way]:
    """Write the same rows with numpy and into a store, on a file system in memory."""
    n, root = 4096 if setting.tiny else WRITTEN, folder(setting)
    rows = torch.randn(n, COLUMNS).half()

    def clear() -> None:
        shutil.rmtree(root)
        root.mkdir()

    return {
        "np.save": Way(lambda: np.save(root / "rows.npy", rows.numpy()), clear),
        "store": Way(lambda: filled(root / "store", rows, 4096), clear),
    }


def searching(setting: Setting, queries: int) -> Mapping[str, Way]:
    """Multiply all rows with queries block by block, and search for the best ten.

    Products are of rows in memory, as searches of the store that is held are; others read files.
    """
    n = 8192 if setting.tiny else SEARCHED
    rows = torch.randn(n, COLUMNS).half()
    store = filled(folder(setting) / "store", rows, 4096)
    store.search(rows[:1].float())  # compares every shard with its hash, once
    held = store.held(progress=False)
    asked = torch.randn(queries, COLUMNS)

    def plain() -> None:
        for block in rows.split(4096):
            asked @ block.float().mT

    return {
        "products": Way(plain),
        "dot": Way(lambda: store.search(asked)),
        "cosine": Way(lambda: store.search(asked, by="cosine")),
        "held": Way(lambda: held.search(asked)),
        "held, cosine": Way(lambda: held.search(asked, by="cosine")),
    }


def opening(setting: Setting) -> Mapping[str, Way]:
    """Open as many files as a store has shards, and the store, which reads each one's header."""
    n, root = 50 if setting.tiny else 2000, folder(setting)
    filled(root, torch.zeros(4 * n, 8), 4)
    paths = sorted(root.rglob("*.safetensors"))

    def files() -> None:
        for path in paths:
            path.open("rb").close()

    return {
        "files": Way(files),
        "store": Way(lambda: GradientStore.open(root)),
        "first read": Way(lambda: GradientStore.open(root).rows()),
    }


HASHED = ("xxhash",)
"""What a store's hashes need, and a plain checkout may lack."""

CASES = [
    Case(
        "store_write",
        "134 MB of rows, 256 fp16, in units of 4096, to a file system in memory, with checksums",
        writing,
        needs=HASHED,
        goals={"store": 1.95},
        seconds={"store": 2 * COLUMNS * WRITTEN / 1e9},  # 1 GB/s
        volume=2 * COLUMNS * WRITTEN,
    ),
    Case(
        "store_search_1",
        "1 M rows of 256 fp16, exact top 10 of one query",
        lambda setting: searching(setting, 1),
        needs=HASHED,
        seconds={"held": 0.06},
        volume=2 * COLUMNS * SEARCHED,
    ),
    Case(
        "store_search_100",
        "1 M rows of 256 fp16, exact top 10 of 100 queries",
        lambda setting: searching(setting, 100),
        needs=HASHED,
        goals={"dot": 1.0},
        seconds={"dot": 0.8},
        volume=2 * COLUMNS * SEARCHED,
    ),
    Case("store_open", "a store of 2,000 shards is opened", opening, needs=HASHED),
]
