"""What was measured, as a table for the screen, as JSON and as a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.case import Case, Group
from bench.rounds import Timed

Results = Mapping[str, Mapping[str, Timed]]
"""By case and way."""


@dataclass(frozen=True)
class Row:
    """A line of the table: a way of a case, or of a group of cases.

    Attributes:
        case: Name of the case or group.
        way: Name of the way.
        milliseconds: Median time; None for a group.
        ratio: Median of the ratios by round; for a group, the median of its cases'.
        least: Ratio of the fastest runs, likewise.
        spread: Least and largest ratio of a round, or of a case.
        goal: The most that the ratio may be, if there is a goal.
        rate: Bytes in a second by the median time, in units of 10⁹, if the case has a volume.
        limit: The most milliseconds that the median may be, if there is a goal.
    """

    case: str
    way: str
    milliseconds: float | None
    ratio: float
    least: float
    spread: tuple[float, float]
    goal: float | None
    rate: float | None = None
    limit: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the goals were reached; nothing if there are none."""
        said = [] if self.goal is None else [_verdict(self.ratio, self.goal, "")]
        if self.limit is not None and self.milliseconds is not None:
            said.append(_verdict(self.milliseconds, self.limit, " ms"))
        return "; ".join(said)


def _verdict(found: float, goal: float, unit: str) -> str:
    return f"{'yes' if found <= goal else 'NO'}, goal {goal:g}{unit}"


def rows(
    cases: Sequence[Case], groups: Sequence[Group], results: Results, *, tiny: bool = False
) -> Iterator[Row]:
    """Yield the lines of the table: cases as they come, then groups.

    Args:
        cases: What was measured.
        groups: Lists of cases.
        results: What was found.
        tiny: Whether sizes are tiny, of which times and rates mean nothing.
    """
    for case in cases:
        for way, timed in results[case.name].items():
            spread = min(timed.ratios), max(timed.ratios)
            taken, limit = median(timed.seconds), case.seconds.get(way)
            yield Row(
                case.name,
                way,
                1000 * taken,
                timed.ratio,
                timed.least,
                spread,
                case.goals.get(way),
                case.volume / taken / 1e9 if case.volume and not tiny else None,
                None if limit is None or tiny else 1000 * limit,
            )
    for group in groups:
        members = [results[case.name] for case in cases if case.group == group.name]
        for way in members[0] if members else ():
            ratios = [each[way].ratio for each in members]
            least = median(each[way].least for each in members)
            spread, goal = (min(ratios), max(ratios)), group.goals.get(way)
            label = f"{group.name}: median of {len(members)}"
            yield Row(label, way, None, median(ratios), least, spread, goal)


def table(lines: Sequence[Row]) -> str:
    """Lay out the lines in columns."""
    head = ("case", "way", "ms", "GB/s", "ratio", "fastest", "from-to", "goals reached")
    cells = [head, *map(_cells, lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = (0, 1, 7)  # text; the rest are numbers

    def laid_out(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        return "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width) for at, (cell, width) in pairs
        ).rstrip()

    return "\n".join(map(laid_out, cells))


def _cells(row: Row) -> tuple[str, ...]:
    least, largest = row.spread
    return (
        row.case,
        row.way,
        "" if row.milliseconds is None else f"{row.milliseconds:.2f}",
        "" if row.rate is None else f"{row.rate:.2f}",
        f"{row.ratio:.3f}",
        f"{row.least:.3f}",
        f"{least:.2f}-{largest:.2f}",
        row.verdict,
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Say what the times were taken with."""
    on_cpu = device.type == "cpu"
    name = platform.machine() if on_cpu else torch.get_device_module(device).get_device_name(device)
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def write_json(
    path: Path, device: torch.device, cases: Sequence[Case], lines: Sequence[Row], results: Results
) -> None:
    """Write everything: what the table says, and each round's seconds."""
    written = {
        "environment": environment(device),
        "subjects": {case.name: case.subject for case in cases},
        "rows": [{**vars(row)} for row in lines],
        "seconds": {
            name: {way: timed.seconds for way, timed in ways.items()}
            for name, ways in results.items()
        },
    }
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, lines: Sequence[Row]) -> None:
    """Draw the ratios as bars from one, with what rounds gave as a line and goals as marks."""
    from matplotlib.figure import Figure  # takes a second, and need not be there for a table

    shown = [row for row in lines if row.ratio != 1 or row.goal is not None][::-1]
    figure = Figure(figsize=(8, 1 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, [row.ratio - 1 for row in shown], left=1, color="#9db8d2")
    axes.hlines(places, *zip(*(row.spread for row in shown), strict=True), color="#33516e")
    goals = [(row.goal, at) for at, row in enumerate(shown) if row.goal is not None]
    axes.plot(*zip(*goals, strict=True), "|", color="#b3261e", markersize=12, markeredgewidth=2)
    axes.set_yticks(places, [f"{row.case} · {row.way}" for row in shown], fontsize=7)
    axes.set_xlabel("times as long as a plain step: median, range; red: the goal")
    axes.axvline(1, color="black", linewidth=0.8)
    figure.savefig(path)
