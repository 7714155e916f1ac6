"""The report's pictures, as text that stands in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

QUIET, FAINT = "#5b6a77", "#e3e8ec"


@dataclass(frozen=True)
class Line:
    """Results of one method.

    Attributes:
        title: Stands in the legend.
        colour: Of its dots and its line.
        marker: Of its means, by matplotlib's name.
        values: What each seed gave, by the place on the horizontal axis.
    """

    title: str
    colour: str
    marker: str
    values: Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """Results of several methods over the same places.

    Attributes:
        title: Stands above.
        lines: One for each method, in the order of the legend.
        references: Heights to compare with, by their names.
    """

    title: str
    lines: Sequence[Line]
    references: Mapping[str, float] = field(default_factory=dict)


def panels(shown: Sequence[Panel], below: str) -> str:
    """Draw panels side by side with one legend: seeds are dots, their means are joined by lines.

    Args:
        shown: The panels; all have the lines of the first one.
        below: What the horizontal axis tells. Its place 0 is written "none".

    Returns:
        An `<svg>` element.
    """
    figure = Figure(figsize=(5.6 * len(shown), 6), layout="constrained")
    drawn = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, panel in zip(drawn, shown, strict=True):
        _draw(axes, panel, below)
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    return _as_svg(figure, " ".join(panel.title for panel in shown))


def _draw(axes: Axes, panel: Panel, below: str) -> None:
    places = sorted({place for line in panel.lines for place in line.values})
    for line in panel.lines:
        where = [places.index(place) + _shift(panel.lines, line, place) for place in line.values]
        for x, values in zip(where, line.values.values(), strict=True):
            axes.scatter([x] * len(values), values, s=12, color=line.colour, alpha=0.45, lw=0)
        means = [fmean(values) for values in line.values.values()]
        look: dict[str, Any] = {"color": line.colour, "marker": line.marker}
        axes.plot(where, means, label=line.title, markersize=6.5, linewidth=1.4, **look)
    for name, height in panel.references.items():
        axes.axhline(height, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        right = (len(places) - 0.45, height)
        axes.annotate(name, right, va="center", color=QUIET, annotation_clip=False)
    axes.set_xticks(range(len(places)), [str(place) if place else "none" for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    for edge in range(1, len(places)):
        axes.axvline(edge - 0.5, color=FAINT, linewidth=0.8, zorder=0)
    axes.set_xlabel(below)
    axes.set_title(panel.title, loc="left", fontweight="bold", fontsize=11)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)


def _shift(lines: Sequence[Line], line: Line, place: int) -> float:
    """Return how far aside a line's dots stand, so that equal methods can be told apart."""
    there = [each.title for each in lines if place in each.values]
    return (there.index(line.title) - (len(there) - 1) / 2) * 0.75 / max(len(there), 4)


def bars(values: Mapping[str, tuple[float, float]], below: str) -> str:
    """Draw a bar with its standard error for each name, the first one on top.

    Args:
        values: Means and errors by name.
        below: What the horizontal axis tells.

    Returns:
        An `<svg>` element.
    """
    figure = Figure(figsize=(7.5, 0.6 + 0.45 * len(values)), layout="constrained")
    axes = figure.subplots()
    places = range(len(values))
    means, errors = zip(*values.values(), strict=True)
    colours = ["#0d3f8f" if name.startswith("Ghost") else "#93a0ab" for name in values]
    axes.barh(places, means, xerr=errors, color=colours, ecolor=QUIET, height=0.6)
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    axes.set_xlabel(below)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)
    return _as_svg(figure, below)


def digit(pixels: Tensor) -> str:
    """Return grey values `[8, 8]` as the address of an embedded picture, dark on light."""
    buffer = io.BytesIO()
    image.imsave(buffer, 1 - pixels.numpy(), cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _as_svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    # Names of parts come from what they hold, so that the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
