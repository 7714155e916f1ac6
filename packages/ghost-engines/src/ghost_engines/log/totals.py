"""Values added up over the steps of a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ghost_engines.values import CreditedStep, Sums, ValueTable


def totals(
    steps: Iterable[CreditedStep],
    directions: tuple[str, ...],
    advance: Callable[[int], object],
) -> ValueTable:
    """Add up steps.

    Args:
        steps: The steps.
        directions: Names of the directions.
        advance: Told how many steps are done.

    Returns:
        The sums, in the order in which samples came first.
    """
    sums, k = Sums(directions), len(directions)
    numbers, by_step = [], []
    for each in steps:
        if len(each.ids):
            sums.add(each)
        numbers.append(each.step)
        by_step.append(each.values.sum(0) if len(each.ids) else torch.zeros(k))
        advance(1)
    return ValueTable(
        directions=directions,
        ids=sums.ids,
        values=sums.values,
        counts=sums.counts,
        steps=np.array(numbers, dtype=np.int64),
        by_step=np.array([each.tolist() for each in by_step]).reshape(len(numbers), k),
    )
