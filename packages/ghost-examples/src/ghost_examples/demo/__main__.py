"""The demo of ghost, in about two minutes on a laptop's CPU; nothing is downloaded.

Part 1 trains a small network on digits with wrong labels and finds these by the values that images
get while it trains. Part 2 trains a small language model and looks up, for passages that it never
saw, from which ones it learns alike. Part 3 compares the numbers with autograd's and measures what
they cost. The result is a report to open in a browser; its path is the last line printed.

Exits with 1 if values do not find wrong labels clearly better than the loss, if a number is wrong,
or if ghost changed the training.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from ghost_examples.demo import digits, passages, receipt, report
from ghost_examples.demo.convnet import Recipe
from ghost_examples.demo.subjects import digits_subject, passages_subject


@dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
        output: Folder of the report; made if missing, files of an earlier demo are replaced.
        seeds: How many times part 1 is repeated, each time with other mistakes.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    output: Path = Path("ghost-demo")
    seeds: int = 3
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")


@dataclass(frozen=True)
class Sizes:
    """How large the parts are."""

    recipe: Recipe = field(default_factory=Recipe)
    plan: passages.Plan = field(default_factory=passages.Plan)


def run(options: Options, sizes: Sizes) -> report.Findings:
    """Run all parts, print what they find, and write the report."""
    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    _head("1. Wrong labels: who raised the loss on clean images?")
    found = digits.run(options.seeds, options.device, sizes.recipe)
    digits.show(found)
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
    parameters = {"seeds": options.seeds, "device": options.device}
    return report.Findings(found, looked, receipts, parameters, seconds)


def main(arguments: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """Run from the command line; exits with 1 if the demo fails."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = tyro.cli(Options, args=arguments, prog="ghost_examples.demo", description=__doc__)
    with one_thread():
        findings = run(options, sizes or Sizes())
        path = report.write(options.output, findings)
    _head(f"{'Failed' if findings.failures else 'Done'} after {findings.seconds:.0f} s")
    for failure in findings.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.stderr.flush()
    print(path.absolute())
    sys.exit(1 if findings.failures else 0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one CPU thread, so that results do not depend on the number of cores.

    The tensors are small: two threads that share their cores with other programs were up to sixty
    times slower than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _head(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


if __name__ == "__main__":
    main()
