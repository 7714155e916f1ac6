"""What a training run ends with: values by domain, passages, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
from matplotlib.figure import Figure

from ghost_engines import GroupValues, ValueTable
from ghost_examples.language_models.data import Corpora
from ghost_examples.language_models.metrics import Curves
from ghost_examples.language_models.passages import extremes, short, whole


def as_table(corner: str, rows: Sequence[str], columns: Sequence[str], numbers: np.ndarray) -> str:
    """Return numbers as a table of text.

    Args:
        corner: What stands over the names of the rows.
        rows: Names of the R rows.
        columns: Names of the C columns.
        numbers: `[R, C]`.
    """
    frame = pandas.DataFrame(numbers, list(rows), pandas.Index(columns, name=corner))
    text: str = frame.to_string(float_format="{:.4f}".format, col_space=9)
    return text


def report_losses(curves: Curves, folder: Path) -> str:
    """Draw the losses, to `loss.png`; return those before and after as a table."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = [*curves.train], [*curves.train.values()]
    axes.plot(steps, losses, color="lightgrey", label="training, each step")
    for domain, curve in curves.val.items():
        axes.plot([*curve], [*curve.values()], marker=".", label=f"validation: {domain}")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    both = [[*found.values()] for found in (curves.before, curves.after)]
    return as_table("validation loss", ["before", "after"], [*curves.val], np.array(both))


def report_values(values: ValueTable, corpora: Corpora, count: int, folder: Path) -> str:
    """Write tables, plots and passages of values; return what a person wants to see.

    Files: `values.csv` and `values.png` by sample, `domains.csv` and `domains.png` by domain,
    `passages.md`.

    Args:
        values: Values of a run.
        corpora: What it was trained on.
        count: How many passages to show, most and least valuable.
        folder: Where the files go.
    """
    by_domain = values.by_group(corpora.train.domain_of)
    by_domain.to_csv(folder / "domains.csv")
    draw_domains(by_domain, folder / "domains.png")
    values.to_csv(folder / "values.csv")
    values.plot(folder / "values.png")
    found = list(extremes(values, corpora, count))
    passages = "\n".join(whole(each) for each in found)
    (folder / "passages.md").write_text(passages, encoding="utf-8")
    sums = as_table("value of", by_domain.groups, by_domain.directions, by_domain.values)
    explained = "How much the passages of each domain (down) lowered validation losses (across):"
    return f"{explained}\n{sums}\n\n{short(found[0])}"


def draw_domains(by_domain: GroupValues, path: Path) -> None:
    """Draw values by domain and validation domain as a heat map, with the numbers."""
    figure = by_domain.plot()
    axes = figure.axes[0]
    axes.set(xlabel="validation loss of", ylabel="passages of")
    strongest = np.abs(by_domain.values).max()
    for (row, column), value in np.ndenumerate(by_domain.values):
        colour = "white" if abs(value) > strongest / 2 else "black"
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 1.5, height + 1.5)
    figure.savefig(path, dpi=120)
