"""Reads what a run has recorded: its loss, step by step, and its validation losses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ghost_examples.language_models.training import VALIDATION

Curve = dict[int, float]
"""Numbers by step."""


@dataclass(frozen=True)
class Curves:
    """Losses over a run.

    Attributes:
        train: The loss of each step's batch.
        val: The validation loss of each domain, before the first step and then now and then.
    """

    train: Curve
    val: dict[str, Curve]

    @property
    def before(self) -> dict[str, float]:
        """Validation losses before the first step, by domain."""
        return {domain: curve[min(curve)] for domain, curve in self.val.items()}

    @property
    def after(self) -> dict[str, float]:
        """Validation losses after the last step, by domain."""
        return {domain: curve[max(curve)] for domain, curve in self.val.items()}


def read_curves(folder: Path) -> Curves:
    """Read the metrics in a run's folder.

    Raises:
        OSError: If there are none.
    """
    train: Curve = {}
    val: dict[str, Curve] = {}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for entry in map(json.loads, lines):
        step = entry.pop("step")
        for name, value in entry.items():
            if name.startswith(VALIDATION):
                val.setdefault(name.removeprefix(VALIDATION), {})[step] = value
            else:
                train[step] = value
    return Curves(train, val)
