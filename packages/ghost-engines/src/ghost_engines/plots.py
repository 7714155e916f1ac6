"""Pictures of numbers by sample."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ghost_core import UnknownNameError
from ghost_engines.extras import needed
from ghost_engines.files import write_atomically
from ghost_engines.tables import check_folder, extremes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELPFUL, HARMFUL = "tab:blue", "tab:red"
_KINDS = (".pdf", ".png", ".svg")


def sample_figure(
    ids: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    what: str,
    *,
    signed: bool,
    top: int,
    over: tuple[str, np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draw the highest and lowest values by sample, and how they are distributed.

    Args:
        ids: Sample ids, `[N]`.
        values: `[N, K]`. Those that are not finite are left out.
        names: Names of the K columns, a row of pictures each.
        what: What the values are.
        signed: Whether positive means helpful, and negative harmful.
        top: How many samples to name of each.
        over: The name of another axis, its points `[B]`, and sums of values at them `[B, K]`.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    columns = 2 if over is None else 3
    rows = max(len(names), 1)
    figure: Figure = _figure("plot()", figsize=(5 * columns, 1.5 + 3 * rows))
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for at, name in enumerate(names):
        ends = "most helpful, most harmful" if signed else "highest, lowest"
        _draw_extremes(grid[at][0], ids, values[:, at], extremes(values[:, at], top, signed=signed))
        grid[at][0].set(title=f"{name}: {ends}", xlabel=what, ylabel="sample")
        finite = values[np.isfinite(values[:, at]), at]
        grid[at][1].hist(finite, bins=40, color=HELPFUL)
        grid[at][1].axvline(0, color="black", linewidth=0.8)
        grid[at][1].set(title=f"{name}: distribution", xlabel=what, ylabel="samples")
        if over is not None:
            axis, points, sums = over
            grid[at][2].plot(points, sums[:, at], color=HELPFUL)
            grid[at][2].axhline(0, color="black", linewidth=0.8)
            grid[at][2].set(title=f"{name}: over time", xlabel=axis, ylabel=f"sum of {what}s")
    return figure


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], what: str) -> Figure:
    """Draw numbers as colours: red below zero, blue above.

    Args:
        values: `[R, C]`. Those that are not finite are left out.
        rows: Names of the R rows.
        columns: Names of the C columns.
        what: What the numbers are.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    size = (3 + 0.8 * len(columns), 1.5 + 0.35 * len(rows))
    figure: Figure = _figure("plot()", figsize=size)
    axes: Any = figure.subplots()
    bound = np.abs(values[np.isfinite(values)]).max(initial=0.0) or 1.0
    picture = axes.imshow(values, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_yticks(np.arange(len(rows)), list(rows))
    axes.set_xticks(np.arange(len(columns)), list(columns), rotation=45, ha="right")
    figure.colorbar(picture, label=what)
    return figure


def curves(places: np.ndarray, lines: Mapping[str, np.ndarray], below: str, beside: str) -> Figure:
    """Draw lines with a band of one standard deviation.

    Args:
        places: Places on the horizontal axis, `[P]`.
        lines: Values `[P, seeds]` by name.
        below: What the horizontal axis tells.
        beside: What the values are.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure: Figure = _figure("plot()", figsize=(6, 4))
    axes: Any = figure.subplots()
    for name, values in lines.items():
        mean, spread = values.mean(1), values.std(1)
        axes.plot(places, mean, marker="o", label=name)
        axes.fill_between(places, mean - spread, mean + spread, alpha=0.2)
    axes.set(xlabel=below, ylabel=beside)
    axes.legend(frameon=False)
    return figure


def check_picture(path: Path) -> None:
    """Raise if a picture cannot be written to a file.

    Raises:
        UnknownNameError: If its name does not end as that of a kind of picture that is known.
        MissingExtraError: If matplotlib is not installed.
        OSError: If its folder is not there.
    """
    if path.suffix not in _KINDS:
        raise UnknownNameError("kind of picture", path.suffix, _KINDS, f"It is the end of {path}.")
    _figure(str(path))
    check_folder(path)


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Write a figure to a file, if a path is given, and return it.

    Raises:
        UnknownNameError: If the file's name does not end as that of a kind of picture.
        OSError: If it cannot be written; a file that was there before still is.
    """
    if path is not None:
        path = Path(path)
        check_picture(path)
        data = io.BytesIO()
        figure.savefig(data, format=path.suffix[1:])
        write_atomically(path.absolute(), data.getvalue(), path.absolute().parent)
    return figure


def _draw_extremes(
    axes: Any, ids: np.ndarray, values: np.ndarray, ends: tuple[np.ndarray, np.ndarray]
) -> None:
    helpful, harmful = ends
    chosen = np.concatenate([helpful, harmful[::-1]])
    colours = [HELPFUL] * len(helpful) + [HARMFUL] * len(harmful)
    places = np.arange(len(chosen))
    axes.barh(places, values[chosen], color=colours)
    axes.set_yticks(places, [str(each) for each in ids[chosen]])
    axes.invert_yaxis()


def _figure(purpose: str, **options: Any) -> Any:
    """Make a figure that no window and no global state knows of."""
    return needed("matplotlib.figure", "plot", purpose).Figure(layout="constrained", **options)
