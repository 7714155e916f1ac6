"""Trainings of which everything is known, for one process and for several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

N, Q = 20, 3


def effects() -> np.ndarray:
    """Return by how much each sample lowers each query's loss, `[Q, N]`."""
    return np.random.default_rng(0).normal(size=(Q, N))


@dataclass(frozen=True)
class Additive:
    """Losses that samples lower one by one; ids count in steps of ten.

    Attributes:
        log: A file to which each training adds a line, if anywhere.
        fails_after: How many lines there may be before a training fails.
        noise: How much the seed changes a loss.
    """

    log: Path | None = None
    fails_after: int | None = None
    noise: float = 0.0

    def __call__(self, ids: np.ndarray, seed: int) -> np.ndarray:
        assert ids.dtype == np.int64
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{seed} {ids.tolist()}\n")
            done = len(self.log.read_text().splitlines())
            if self.fails_after is not None and done > self.fails_after:
                raise RuntimeError("the machine is gone")
        shaken = np.random.default_rng(seed).normal(size=Q) * self.noise
        return 5 - effects()[:, ids // 10].sum(1) + shaken


def returns_too_few(ids: np.ndarray, seed: int) -> np.ndarray:
    return np.zeros(Q - 1)


def returns_nan(ids: np.ndarray, seed: int) -> list[float]:
    return [float("nan")] * Q


def returns_words(ids: np.ndarray, seed: int) -> list[str]:
    return ["a"] * Q
