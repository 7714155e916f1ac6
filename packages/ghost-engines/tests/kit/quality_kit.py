"""Trainings of which everything is known, for one process and for several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

N, Q = 20, 3


def effects() -> np.ndarray:
    """Return by how much each sample lowers each query's loss, `[Q, N]`."""
    return np.random.default_rng(0).normal(size=(Q, N))


@dataclass(frozen=True)
class Additive:
    """Losses that samples lower one by one; ids count in steps of ten.

    Attributes:
        log: A file to which each training adds a line, if anywhere. If there is one beside it with
            the suffix `.limit`, it says how many lines there may be before a training fails.
        noise: How much the seed changes a loss.
    """

    log: Path | None = None
    noise: float = 0.0

    def __call__(self, ids: np.ndarray, seed: int) -> np.ndarray:
        assert ids.dtype == np.int64
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{seed} {ids.tolist()}\n")
            done = len(self.log.read_text().splitlines())
            limit = self.log.with_suffix(".limit")
            if limit.exists() and done > int(limit.read_text()):
                raise RuntimeError("the machine is gone")
        shaken = np.random.default_rng(seed).normal(size=Q) * self.noise
        return 5 - effects()[:, ids // 10].sum(1) + shaken


def returns_too_few(ids: np.ndarray, seed: int) -> np.ndarray:
    return np.zeros(Q - 1)


def returns_nan(ids: np.ndarray, seed: int) -> list[float]:
    return [float("nan")] * Q


def returns_words(ids: np.ndarray, seed: int) -> list[str]:
    return ["a"] * Q


def weighed(ids: np.ndarray, seed: int, weight: Any = 1.0) -> np.ndarray:
    return np.full(Q, float(weight) * ids.sum())


def dies(ids: np.ndarray, seed: int) -> np.ndarray:
    os._exit(3)
