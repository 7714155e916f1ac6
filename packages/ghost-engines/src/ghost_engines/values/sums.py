"""Adds up the values of all samples while training runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghost_engines.values.credit import CreditedStep

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

COUNTS = ("times_seen", "first_step", "last_step", "altered")
"""How often a sample was credited, by which step first and last, and how often by steps whose
gradients were changed in a way that values do not know."""

_STATE = ("ids", "values", "shares", "counts", "steps", "by_step", "shares_by_step")


class Sums:
    """Adds up what steps credit, by sample id. Rows are in the order in which samples came.

    Args:
        directions: Names of the K directions.
    """

    def __init__(self, directions: Iterable[str]) -> None:
        self.directions = tuple(directions)
        self._rows: dict[int, int] = {}
        k = len(self.directions)
        # Longer than there are samples, so that they need not grow with each.
        self._values: Floats = np.zeros((0, k))
        self._shares: Floats = np.zeros((0, k))
        self._counts: Integers = np.zeros((0, len(COUNTS)), dtype=np.int64)
        self._steps: list[int] = []
        self._by_step: list[list[float]] = []
        self._shares_by_step: list[list[float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sample: object) -> bool:
        return sample in self._rows

    @property
    def ids(self) -> Integers:
        """Sample ids, int64 `[S]`."""
        return np.fromiter(self._rows, dtype=np.int64, count=len(self))

    @property
    def values(self) -> Floats:
        """Sums over steps, float64 `[S, K]`."""
        return self._values[: len(self)]

    @property
    def shares(self) -> Floats:
        """Sums of values over the magnitudes of all in their step, float64 `[S, K]`.

        Every step hands out as much, whatever its learning rate and however large the gradients.
        """
        return self._shares[: len(self)]

    @property
    def counts(self) -> Integers:
        """What `COUNTS` says, int64 `[S, 4]`."""
        return self._counts[: len(self)]

    @property
    def steps(self) -> Integers:
        """Numbers of the steps that credited somebody, int64 `[B]`."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def by_step(self) -> Floats:
        """What these credited to all of their samples, float64 `[B, K]`."""
        return np.array(self._by_step).reshape(len(self._steps), len(self.directions))

    @property
    def shares_by_step(self) -> Floats:
        """The same of `shares`, float64 `[B, K]`."""
        return np.array(self._shares_by_step).reshape(len(self._steps), len(self.directions))

    def row(self, sample: int) -> int:
        """Return where a sample stands."""
        return self._rows[sample]

    def add(self, credited: CreditedStep) -> None:
        """Add what a step credited."""
        known = len(self)
        ids = credited.ids.tolist()
        rows = np.array([self._rows.setdefault(each, len(self)) for each in ids], dtype=np.int64)
        self._grow()
        values = credited.values.numpy()
        magnitudes = np.abs(values).sum(0)
        shares = np.divide(values, magnitudes, out=np.zeros_like(values), where=magnitudes != 0)
        np.add.at(self._values, rows, values)
        np.add.at(self._shares, rows, shares)
        np.add.at(self._counts[:, 0], rows, 1)
        self._counts[known : len(self), 1] = credited.step
        self._counts[rows, 2] = credited.step
        np.add.at(self._counts[:, 3], rows, int(credited.altered))
        self._steps.append(credited.step)
        self._by_step.append(values.sum(0).tolist())
        self._shares_by_step.append(shares.sum(0).tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, as tensors."""
        return {
            "directions": list(self.directions),
            **{name: torch.from_numpy(getattr(self, name).copy()) for name in _STATE},
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Sums:
        """Return the sums whose state it is."""
        sums = cls(state["directions"])
        sums._rows = {sample: row for row, sample in enumerate(state["ids"].tolist())}
        sums._values, sums._shares, sums._counts = (
            state[name].cpu().numpy().copy() for name in ("values", "shares", "counts")
        )
        sums._steps, sums._by_step, sums._shares_by_step = (
            state[name].tolist() for name in ("steps", "by_step", "shares_by_step")
        )
        return sums

    def _grow(self) -> None:
        if len(self) > len(self._values):
            more = 2 * len(self)
            self._values, self._shares, self._counts = (
                _longer(each, more) for each in (self._values, self._shares, self._counts)
            )


def _longer(rows: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    return np.concatenate([rows, np.zeros((length - len(rows), *rows.shape[1:]), rows.dtype)])
