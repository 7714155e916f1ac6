"""Shows which sampler handles what, and what is followed as the same for all samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ghost_core.tracking.tracking import Tracking

Followed = dict[str, dict[str, bool]]
"""The operations in which parameters met the samples, by name, each with whether it has a closed
form."""

_COSTS = {
    True: "closed form",
    False: "one backward pass of the operation per sample",
}

_UNIT = "one forward and one backward pass of it, and its gradients for all samples at once"


def coverage(tracking: Tracking, followed: Mapping[str, Mapping[str, bool]]) -> str:
    """Return tables of modules and samplers, of units, and of what was followed, if anything.

    Args:
        tracking: What is tracked.
        followed: What was followed, as far as batches showed.
    """
    modules = [("module", "class", "sampler", "parameters")]
    for tracked in tracking.modules:
        names = ", ".join(parameter.name for parameter in tracked.parameters.values())
        kinds = type(tracked.module).__name__, type(tracked.sampler).__name__
        modules.append((tracked.name or "(root)", *kinds, names))
    units = [
        (tracked.name or "(root)", str(len(tracked.parameters)), _UNIT)
        for tracked in tracking.modules
        if tracked.unit
    ]
    tables = [_table(modules)]
    if units:
        tables.append(_table([("run again as one", "parameters", "at the cost of"), *units]))
    shared = [
        (name, operation, _COSTS[closed])
        for name in sorted(tracking.names & followed.keys())
        for operation, closed in sorted(followed[name].items())
    ]
    if shared:
        head = ("the same for all samples", "meets them in", "at the cost of")
        tables.append(_table([head, *shared]))
    return "\n\n".join(tables)


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
