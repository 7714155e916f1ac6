"""A log of steps that are known by their numbers and by the run that made them."""

import torch

from ghost_engines import ScoreLog
from ghost_engines.values import CreditedStep

NAMES = ("val", "test")

UNIT = 24


def step(number, run=0):
    """Return what a step credits in a run; every fifth credits nobody."""
    n = 0 if number % 5 == 0 else 1 + number * 7 % 4
    ids = (torch.arange(n) * number) % 11 - 2
    values = (number + torch.arange(2 * n).reshape(n, 2) / 8) * (-1) ** number + run * 1000.0
    return CreditedStep(
        step=number, ids=ids, values=values.double(), directions=NAMES, altered=number % 3 == 0
    )


def fill(log, last, run=0):
    for number in range((log.last or 0) + 1, last + 1):
        log.append(step(number, run))


def same(left, right):
    return (
        left.step == right.step
        and torch.equal(left.ids, right.ids)
        and torch.equal(left.values, right.values)
        and left.altered == right.altered
        and (left.directions == right.directions or not len(left.ids))
    )


def holds(log, runs):
    """Tell whether a log has exactly these steps; step n was made in the run `runs[n - 1]`."""
    found, wanted = list(log), [step(number, run) for number, run in enumerate(runs, 1)]
    return len(found) == len(wanted) and all(map(same, found, wanted))


def assert_holds(log, runs):
    assert [each.step for each in log] == list(range(1, len(runs) + 1))
    assert holds(log, runs)
    assert len(log) == len(runs)
    assert log.last == (len(runs) or None)


def make(root, last, unit=UNIT):
    with ScoreLog.create(root, unit=unit) as log:
        fill(log, last)
    return root
