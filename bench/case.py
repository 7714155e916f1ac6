"""What a case is: ways to do the same step, the plain one first, to be timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Setting:
    """Where and at what size cases run.

    Attributes:
        device: Where models and batches are.
        tiny: Whether sizes are such that everything runs in a moment, for tests: the ratios mean
            nothing.
        stack: Closed after the case, for engines that stay attached and files.
    """

    device: torch.device
    tiny: bool
    stack: ExitStack


@dataclass(frozen=True)
class Way:
    """One way to do a case's step.

    Attributes:
        run: Does it; this is timed.
        before: Gets ready for it, as by clearing gradients; this is not timed.
    """

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Case:
    """Ways to do the same step, and what they may cost.

    Attributes:
        name: What `--only` selects.
        subject: A line for a reader: model, sizes, what is done.
        make: Makes the ways by name, for a setting. The first one is what others are compared
            with, a plain step as a rule. No two share a model: an engine leaves hooks on its own.
        goals: The most that ways may cost, as multiples of the first one.
        seconds: The most seconds that ways may take.
        volume: Bytes that each way reads or writes, for the table to say how many in a second.
        needs: Packages that it cannot do without, and that a plain checkout may lack.
        group: Name of the list of cases that it belongs to, whose medians are reported; or none.
    """

    name: str
    subject: str
    make: Callable[[Setting], Mapping[str, Way]]
    goals: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    volume: int = 0
    needs: Sequence[str] = ()
    group: str = ""


@dataclass(frozen=True)
class Group:
    """A list of cases with the same ways, whose medians over the cases have goals.

    Attributes:
        name: What its cases name.
        subject: A line for a reader.
        goals: The most that the median over the cases of a way's ratio may be.
    """

    name: str
    subject: str
    goals: Mapping[str, float]
