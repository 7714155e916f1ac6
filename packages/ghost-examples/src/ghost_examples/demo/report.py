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

from ghost_examples.demo import figures, files
from ghost_examples.demo.annotator import CONFUSIONS, SHARE
from ghost_examples.demo.digits import BOUNDS, METHODS, DigitsResult
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
        return [*self.digits.failures, *(line for each in self.receipts for line in each.failures)]


def write(output: Path, findings: Findings) -> Path:
    """Write report.html, results.json and digits.csv; return the path of the report.

    Raises:
        OSError: If a file cannot be written.
    """
    files.write(output / "digits.csv", findings.digits.seeds[0].table.to_csv(index=False))
    results = json.dumps(as_results(findings), indent=1, allow_nan=False)
    files.write(output / "results.json", results + "\n")
    report = output / "report.html"
    files.write(report, render(findings))
    return report


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
    titles, digits = {**METHODS, **BOUNDS}, findings.digits
    precision = {titles[name]: digits.precision[name] for name in METHODS}
    accuracy = {titles[name]: digits.accuracy[name] for name in titles}
    value = METHODS["value"]
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
        precision_bars=figures.bars(precision, "Wrong labels among those left out", accent=value),
        accuracy_bars=figures.bars(
            accuracy, "Test accuracy without them", accent=value, references=len(BOUNDS)
        ),
        versions=versions(),
        machine=machine(),
    )


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
