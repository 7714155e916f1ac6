"""The demo of ghost, in two or three minutes on a laptop's CPU; nothing is downloaded.

Part 1 trains a small network on digits with wrong labels and looks for these with few clean images:
by simple ways, named first, and by ghost's in-run values and dot products. Part 2 trains a small
language model and looks up, for passages that it never saw, from which ones it learns alike. Part 3
compares the numbers with autograd's and measures what they cost. The result is a report to open in
a browser; its path is the last line printed.

Exits with 1 if ghost's scores do not find wrong labels clearly better than the loss, or, with few
clean images, than classifiers fitted on these; if a number is wrong; if ghost changed the training.

More seeds for the figure of part 1, about half a minute each: --seeds 10
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ghost_examples.command_line import read_options
from ghost_examples.demo import claims, digits, passages, receipt, report
from ghost_examples.demo.annotator import PER_DIGIT
from ghost_examples.demo.convnet import Recipe
from ghost_examples.demo.subjects import digits_subject, passages_subject
from ghost_examples.demo.threads import one_thread


@dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
        output: Folder of the report; made if missing, files of an earlier demo are replaced.
        seeds: How many times part 1 is repeated, each time with other mistakes.
        clean: How many clean images the ways of part 1 get, each time: multiples of 10 up to 200.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    output: Path = Path("ghost-demo")
    seeds: int = 3
    clean: tuple[int, ...] = digits.COUNTS
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")
        most = 10 * PER_DIGIT
        if not self.clean or any(n % 10 or not 10 <= n <= most for n in self.clean):
            raise ValueError(f"clean must be multiples of 10 up to {most}, not {self.clean}")


@dataclass(frozen=True)
class Sizes:
    """How large the parts are."""

    recipe: Recipe = field(default_factory=Recipe)
    plan: passages.Plan = field(default_factory=passages.Plan)


def run(options: Options, sizes: Sizes) -> report.Findings:
    """Run all parts, print what they find, and write the report."""
    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    _head("1. Wrong labels: how far do a few clean images go?")
    found = digits.run(options.seeds, options.device, sizes.recipe, options.clean)
    claims.show(found)
    _head("2. Passages: from which ones does a model learn alike?")
    looked = passages.run(options.output / "gradients", options.device, sizes.plan)
    passages.show(looked)
    _head("3. The receipt: compared with autograd, one sample at a time")
    subjects = (
        digits_subject(sizes.recipe, options.device),
        passages_subject(sizes.plan, options.device),
    )
    receipts = [receipt.check(subject) for subject in subjects]
    receipt.show(receipts)
    seconds = time.perf_counter() - start
    parameters = {"seeds": options.seeds, "clean": list(found.counts), "device": options.device}
    return report.Findings(found, looked, receipts, parameters, seconds)


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """Run from the command line; exits with 1 if the demo fails."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = read_options(Options, arguments, name="demo", description=__doc__)
    with one_thread():
        findings = run(options, sizes or Sizes())
        path = report.write(options.output, findings)
    _head(f"{'Failed' if findings.failures else 'Done'} after {findings.seconds:.0f} s")
    for failure in findings.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.stderr.flush()
    print(path.absolute())
    sys.exit(1 if findings.failures else 0)


def _head(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


if __name__ == "__main__":
    main()
