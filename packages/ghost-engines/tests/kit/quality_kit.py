"""Trainings of which everything is known, for one process and for several."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

N, Q = 20, 3


def effects() -> np.ndarray:
    """Return by how much each sample lowers each query's loss, `[Q, N]`."""
    return np.random.default_rng(0).normal(size=(Q, N))


def logged(log: Path, line: str) -> None:
    """Add a line to a file, and fail if there are more then than a file beside it allows.

    With the suffix `.limit` that is an error; with `.self` or `.parent` that process is killed.
    """
    with log.open("a") as file:
        file.write(f"{line}\n")
    done = len(log.read_text().splitlines())
    for limit in log.parent.glob(f"{log.stem}.*"):
        if done <= int(limit.read_text()):
            continue
        if limit.suffix == ".limit":
            raise RuntimeError("the machine is gone")
        os.kill(os.getpid() if limit.suffix == ".self" else os.getppid(), signal.SIGKILL)


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
            logged(self.log, f"{seed} {ids.tolist()}")
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


def small_model() -> nn.Module:
    """Return a model that draws random numbers."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def asked(count: int) -> dict[str, list[Tensor]]:
    """Return queries, and what was found for each."""
    batches = torch.randn(2 * count, 2, 3, generator=torch.Generator().manual_seed(1))
    return {"queries": [*batches[:count]], "found": [*batches[count:]]}


def squared(model: nn.Module, batch: Tensor, log: Path | None = None) -> Tensor:
    """Return a loss for each sample; adds a line to a file in each call."""
    if log is not None:
        logged(log, str(batch.sum().item()))
    return model(batch).square().sum(1)
