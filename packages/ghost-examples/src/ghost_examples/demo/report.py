"""Writes what the demo found into a page that needs nothing but a browser."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from ghost_engines.files import make_root, write_atomically
from ghost_examples.demo import claims, figures, once_more
from ghost_examples.demo.annotator import CONFUSIONS, SHARE
from ghost_examples.demo.digits import ByCount, DigitsResult
from ghost_examples.demo.methods import BOUNDS, METHODS, TITLES
from ghost_examples.demo.passages import PassagesResult
from ghost_examples.demo.receipt import TOLERANCE, Receipt
from ghost_examples.texts import DOMAINS

PACKAGES = (
    "ghost-core",
    "ghost-layers",
    "ghost-engines",
    "ghost-examples",
    "torch",
    "transformers",
    "scikit-learn",
)
"""Distributions whose versions are named."""

GRID = 40
"""Flagged images to show."""

LOOKS = {
    "random": ("#c3ccd4", "o"),
    "loss": ("#93a0ab", "s"),
    "norm": ("#5b6a77", "v"),
    "crossed": ("#1c2733", "D"),
    "neighbours": ("#d99a00", "o"),
    "machine": ("#b3261e", "s"),
    "alone": ("#c45f9b", "v"),
    "further": ("#0b8a5f", "D"),
    "value": ("#3f9bdc", "^"),
    "dot": ("#0d3f8f", "P"),
}
"""Colour and marker by method."""


@dataclass(frozen=True)
class Findings:
    """Everything the demo found.

    Attributes:
        digits: Of the first part.
        passages: Of the second part.
        receipts: One for each model.
        parameters: What the demo was run with.
        seconds: How long it took.
    """

    digits: DigitsResult
    passages: PassagesResult
    receipts: Sequence[Receipt]
    parameters: Mapping[str, object]
    seconds: float

    @property
    def failures(self) -> list[str]:
        """Why the demo fails; nothing if it does not."""
        receipts = (line for each in self.receipts for line in each.failures)
        return [*claims.failures(self.digits), *receipts]


def write(output: Path, findings: Findings) -> Path:
    """Write report.html, results.json and digits.csv; return the path of the report.

    Raises:
        OSError: If a file cannot be written.
    """
    texts = {
        "digits.csv": findings.digits.seeds[0].table.to_csv(index=False),
        "results.json": json.dumps(as_results(findings), indent=1, allow_nan=False) + "\n",
        "report.html": render(findings),
    }
    make_root(output)
    for name, text in texts.items():
        write_atomically(output / name, text.encode(), output)
    return output / "report.html"


def render(findings: Findings) -> str:
    """Return the page. Texts are escaped; pictures and styles stand in the page itself."""
    environment = Environment(
        loader=PackageLoader("ghost_examples.demo"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = figures.digit
    digits = findings.digits
    by_seed = digits.seeds
    return environment.get_template("report.html.j2").render(
        findings=findings,
        digits=digits,
        passages=findings.passages,
        domains={domain.name: domain for domain in DOMAINS},
        first=digits.seeds[0],
        grid=digits.seeds[0].flagged[:GRID],
        confusions=CONFUSIONS,
        share=SHARE,
        tolerance=TOLERANCE,
        methods=METHODS,
        titles=TITLES,
        figure=comparison(digits),
        gains=once_more_bars(findings.passages.once_more),
        precision=claims.rows([seed.precision for seed in by_seed]),
        accuracy=claims.rows([seed.accuracy for seed in by_seed]),
        verdicts=claims.verdicts(digits),
        tie=claims.TIE,
        versions=versions(),
        machine=machine(),
    )


def comparison(digits: DigitsResult) -> str:
    """Draw the precision and the accuracy of all methods over the number of clean images."""
    precision = [seed.precision for seed in digits.seeds]
    accuracy = [seed.accuracy for seed in digits.seeds]
    means = digits.accuracy[digits.counts[0]]
    names = ("untouched", "oracle")
    bounds = {BOUNDS[name].replace(" left", "\nleft"): means[name] for name in names}
    shown = (
        figures.Panel("Share of wrong labels among those left out", _lines(precision)),
        figures.Panel("Test accuracy after training without these", _lines(accuracy), bounds),
    )
    return figures.panels(shown, "clean images")


def once_more_bars(found: once_more.OnceMore) -> str:
    """Draw what a step on a passage gains, by how the passage was chosen."""
    values = {title: (found.mean(way), found.error(way)) for way, title in once_more.WAYS.items()}
    return figures.bars(values, "loss that one step saves, in thousandths of a nat per token")


def _lines(seeds: Sequence[ByCount]) -> list[figures.Line]:
    """Return a line for each method; those that need no clean images have one place."""
    counts = tuple(seeds[0])
    found = []
    for name, method in METHODS.items():
        colour, marker = LOOKS[name]
        places = counts if method.needs_clean else (0,)
        values = {n: [seed[n or counts[0]][name] for seed in seeds] for n in places}
        found.append(figures.Line(method.title, colour, marker, values))
    return found


def as_results(findings: Findings) -> dict[str, Any]:
    """Return the numbers as JSON-able values."""
    digits, passages = findings.digits, findings.passages
    return {
        "failures": findings.failures,
        "digits": {
            "recipe": asdict(digits.recipe),
            "precision": digits.precision,
            "accuracy": digits.accuracy,
            "random_flips_precision": digits.random_precision,
            "by_seed": [
                {
                    "mistakes": seed.mistakes,
                    "precision": dict(seed.precision),
                    "accuracy": dict(seed.accuracy),
                    "random_flips_precision": dict(seed.random_precision),
                }
                for seed in digits.seeds
            ],
        },
        "passages": {
            "plan": asdict(passages.plan),
            "first_loss": passages.first_loss,
            "final_loss": passages.final_loss,
            "stored": dict(passages.stored),
            "columns": passages.columns,
            "nearest_of_own_domain": passages.share,
            "by_domain": passages.own_share,
            "chance": passages.chance,
            "gain_of_one_step_in_millinats": {
                way: {"mean": passages.once_more.mean(way), "error": passages.once_more.error(way)}
                for way in once_more.WAYS
            },
        },
        "receipts": [asdict(receipt) for receipt in findings.receipts],
        "parameters": dict(findings.parameters),
        "seconds": findings.seconds,
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages by name."""
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine() -> str:
    """Return what the demo ran on, in words."""
    return f"{platform.system()} on {platform.machine()}, {torch.get_num_threads()} CPU thread(s)"
