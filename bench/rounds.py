"""Times the ways of a case in turns, so that whatever else a machine does hits all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import torch

from bench.case import Case, Setting, Way


@dataclass(frozen=True)
class Timed:
    """Seconds that a way took, round by round, beside those of the first way.

    Attributes:
        seconds: Its own.
        plain: Those of the first way in the same rounds.
    """

    seconds: list[float]
    plain: list[float]

    @property
    def ratios(self) -> list[float]:
        """What it cost in each round, as multiples of the first way."""
        return [mine / other for mine, other in zip(self.seconds, self.plain, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios by round."""
        return median(self.ratios)

    @property
    def least(self) -> float:
        """The ratio of the fastest runs, which other programs disturb least."""
        return min(self.seconds) / min(self.plain)


def measure(case: Case, device: torch.device, rounds: int, *, tiny: bool) -> dict[str, Timed]:
    """Time the ways of a case after one round that does not count.

    Args:
        case: The case.
        device: Where it runs.
        rounds: How many rounds count.
        tiny: Whether sizes are tiny; see `Setting`.
    """
    with ExitStack() as stack:
        torch.manual_seed(0)
        ways = case.make(Setting(device, tiny, stack))
        taken = interleaved(ways, rounds, waiting(device))
    plain = next(iter(taken.values()))
    return {name: Timed(seconds, plain) for name, seconds in taken.items()}


def interleaved(
    ways: Mapping[str, Way],
    rounds: int,
    wait: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return each way's seconds. Every round starts with another way, as order may matter."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for at in range(rounds + 1):
        first = at % len(names)
        for name in names[first:] + names[:first]:
            way = ways[name]
            way.before()
            gc.collect()  # here, and so not by chance while the time is taken
            wait()
            start = clock()
            way.run()
            wait()
            taken[name].append(clock() - start)
    return {name: seconds[1:] for name, seconds in taken.items()}


def waiting(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device has done its work."""
    if device.type == "cpu":
        return lambda: None
    module = torch.get_device_module(device)
    return lambda: module.synchronize(device)
