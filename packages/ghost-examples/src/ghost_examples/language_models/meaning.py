"""Whether values mean something: training again without a domain, and what that did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ghost_engines import GroupValues
from ghost_examples.language_models.metrics import Curves
from ghost_examples.language_models.report import as_table


@dataclass(frozen=True)
class Meaning:
    """Values of domains, and how validation losses changed without them.

    Attributes:
        domains: Names of the D domains that were left out, each in a run of its own.
        targets: Names of the K validation domains.
        values: How much each domain's samples lowered each loss, by their values, `[D, K]`.
        changes: How much higher each loss was after training without the domain, `[D, K]`.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    values: list[list[float]]
    changes: list[list[float]]

    @property
    def own(self) -> np.ndarray:
        """Where a domain's own validation loss is, bool `[D, K]`."""
        return np.array([[one == other for other in self.targets] for one in self.domains])

    @property
    def correlation(self) -> float | None:
        """Of all D · K pairs, Pearson."""
        return _pearson(np.array(self.values), np.array(self.changes))

    @property
    def correlation_of_others(self) -> float | None:
        """Of the pairs of a domain and the validation loss of another; None below three."""
        others = ~self.own
        return _pearson(np.array(self.values)[others], np.array(self.changes)[others])

    @property
    def correlation_of_sums(self) -> float | None:
        """Of the sums over targets, a pair for each domain."""
        return _pearson(np.array(self.values).sum(1), np.array(self.changes).sum(1))


def compare(by_domain: GroupValues, whole: Curves, without: dict[str, Curves]) -> Meaning:
    """Compare values with what training without each domain did.

    Args:
        by_domain: Values of a run by domain and validation domain.
        whole: Losses of that run.
        without: Losses of the runs without a domain, by its name.
    """
    targets = by_domain.directions
    known = dict(zip(by_domain.groups, by_domain.values.tolist(), strict=True))
    nothing = [0.0] * len(targets)  # a domain of which no sample was drawn
    changes = [
        [curves.after[target] - whole.after[target] for target in targets]
        for curves in without.values()
    ]
    values = [known.get(domain, nothing) for domain in without]
    return Meaning(tuple(without), targets, values, changes)


def report_meaning(found: Meaning, folder: Path) -> str:
    """Write `meaning.json` and `meaning.png`; return a table and the correlations."""
    correlations = {
        "all pairs": found.correlation,
        "pairs of different domains": found.correlation_of_others,
        "sums over validation domains": found.correlation_of_sums,
    }
    content = json.dumps({**asdict(found), "correlations": correlations}, indent=1)
    (folder / "meaning.json").write_text(content + "\n", encoding="utf-8")
    _draw(found, folder / "meaning.png")
    changes = as_table("without", found.domains, found.targets, np.array(found.changes))
    lines = [f"  {name}: {_shown(each)}" for name, each in correlations.items()]
    return (
        "How much higher validation losses (across) are after training without a domain (down):\n"
        f"{changes}\n\nCorrelation of these with the values of domains (Pearson):\n"
        + "\n".join(lines)
    )


def _draw(found: Meaning, path: Path) -> None:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    values, changes = np.array(found.values), np.array(found.changes)
    for at, domain in enumerate(found.domains):
        colour = f"C{at}"
        for on, marker, label in ((found.own[at], "o", domain), (~found.own[at], "x", None)):
            axes.scatter(values[at][on], changes[at][on], color=colour, marker=marker, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="value of the domain: how much it lowered a validation loss",
        ylabel="rise of that loss without the domain",
        title=f"correlation {_shown(found.correlation)}; dots: the domain's own loss, "
        "crosses: another's",
    )
    axes.title.set_fontsize(10)
    axes.legend(title="domain")
    figure.savefig(path, dpi=120)


def _shown(correlation: float | None) -> str:
    return "too few pairs" if correlation is None else f"{correlation:.3f}"


def _pearson(one: np.ndarray, other: np.ndarray) -> float | None:
    one, other = one.ravel(), other.ravel()
    if len(one) < 3:
        return None
    return float(np.corrcoef(one, other)[0, 1])
