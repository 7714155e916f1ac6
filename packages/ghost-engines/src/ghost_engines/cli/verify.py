"""What `ghost verify` does."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ghost_core import UnsupportedLayerError, WrongSplitError
from ghost_core.compare import Comparison, compare
from ghost_core.errors import in_lines
from ghost_core.plugins import select
from ghost_engines.cli.batches import load_batch
from ghost_engines.cli.corpora import CorpusOptions
from ghost_engines.cli.functions import in_one_line, reporting
from ghost_engines.cli.options import Verify
from ghost_engines.cli.subject import Subject, refused, tracked_of
from ghost_engines.cli.tables import plain, print_table, while_read

_SHOWN = 20  # rows of a table at a terminal


def run(options: Verify) -> int:
    """Compare, print what was found, and return the exit status."""
    subject = Subject.load(options, options.loss, options.device)
    model = subject.model
    how = CorpusOptions.of(options, options.data, options.model, "--data", options.text)
    sample = load_batch(how, model, batch_size=options.batch_size)
    batch = subject.place.batch(sample.batch)
    reporting(model.train, "MODEL: its method train")(options.train)
    described = [
        *subject.described(options.model),
        ("data", options.data),
        *_described(batch),
        *([] if sample.cut is None else [("texts", sample.cut)]),
        ("loss", subject.loss_name),
        ("mode", "training" if model.training else "evaluation"),
    ]
    with while_read():
        print_table(("property", "value"), described)
        print()
    bar = tqdm(total=options.samples, desc="samples", disable=None, delay=1.0, leave=False)
    try:
        with bar, in_one_line("the comparison"):
            found = compare(
                model,
                lambda: subject.loss(model, batch),
                select(options.layers, options.exclude),
                samples=options.samples,
                tolerance=options.tolerance,
                progress=bar.update,
            )
    except (UnsupportedLayerError, WrongSplitError) as error:
        return refused(error)
    with while_read():
        _print_findings(model, found)
    return 0 if found.ok else 1


def _described(batch: Any) -> list[tuple[str, str]]:
    """Return how large a batch of tokens is, if it is one."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("attention_mask"), Tensor):
        return []
    mask = batch["attention_mask"]
    padding = 100 * float((mask == 0).double().mean())
    shape = " × ".join(map(str, mask.shape))
    return [("batch", f"{shape} tokens, {padding:.0f} % padding")]


def _print_findings(model: nn.Module, found: Comparison) -> None:
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for check in found.parameters:
        numbers[check.module, check.sampler].append(prod(check.shape))
    print_table(
        ("class", "sampler", "parameters", "numbers"),
        ((*key, str(len(sizes)), str(sum(sizes))) for key, sizes in sorted(numbers.items())),
    )
    rows = ", ".join(map(str, found.samples))
    print(f"\n{tracked_of(model, len(found.parameters))}")
    print(f"compared: samples {rows} of {found.n}\n")
    titles, *checks = found.lines()
    shown = max(_SHOWN, len(found.wrong)) if sys.stdout.isatty() else len(checks)
    print_table(titles, checks[:shown])
    if len(checks) > shown:
        print(f"... and {len(checks) - shown} more, which are within their tolerances")
    print(plain(f"\n{in_lines(found.verdict, found.reason, found.remedy)}"))
