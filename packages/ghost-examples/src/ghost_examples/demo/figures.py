"""The report's pictures, as text that stands in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import matplotlib
from matplotlib import image
from matplotlib.figure import Figure
from torch import Tensor

ACCENT, QUIET, REFERENCE = "#1f5f8b", "#a9b8c4", "#d9dfe4"


def bars(values: Mapping[str, float], title: str, *, accent: str, references: int = 0) -> str:
    """Draw horizontal bars, first one on top.

    Args:
        values: Shares from 0 to 1 by label.
        title: Stands above.
        accent: Label of the bar to stress.
        references: How many of the last bars are there for comparison only.

    Returns:
        An `<svg>` element.
    """
    labels, shares = list(values), list(values.values())
    colours = [ACCENT if label == accent else QUIET for label in labels]
    if references:
        colours[-references:] = [REFERENCE] * references
    figure = Figure(figsize=(5.2, 0.42 * len(labels) + 0.5), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(labels, shares, color=colours, height=0.7)
    axes.bar_label(drawn, [f"{share:.3f}" for share in shares], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    return _as_svg(figure, title)


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
