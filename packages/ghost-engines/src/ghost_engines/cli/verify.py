"""What `ghost verify` does."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ghost_core import UnsupportedLayerError, WrongSplitError
from ghost_core.compare import Comparison, compare
from ghost_core.plugins import select
from ghost_engines.cli.batches import load_batch
from ghost_engines.cli.functions import in_one_line, reporting
from ghost_engines.cli.losses import load_loss
from ghost_engines.cli.models import load_model
from ghost_engines.cli.options import Verify
from ghost_engines.cli.places import Place, described_parameters, seed
from ghost_engines.cli.tables import plain, print_table, while_read

_SHOWN = 20  # rows of a table at a terminal


def run(options: Verify) -> int:
    """Compare, print what was found, and return the exit status."""
    seed(options.seed)
    subject = _load(options)
    reporting(subject.model.train, "MODEL: its method train")(options.train)
    described = reporting(lambda: [*subject.described()], "MODEL: looking at it")()
    with while_read():
        print_table(("property", "value"), described)
    bar = tqdm(total=options.samples, desc="samples", disable=None, delay=1.0, leave=False)
    try:
        with bar, in_one_line("the comparison"):
            found = compare(
                subject.model,
                subject.losses,
                select(options.layers, options.exclude),
                samples=options.samples,
                tolerance=options.tolerance,
                progress=bar.update,
            )
    except (UnsupportedLayerError, WrongSplitError) as error:
        with while_read():
            print(plain(f"\nrefused: {error}"))
        return 1
    with while_read():
        _print_findings(subject.model, found)
    return 0 if found.ok else 1


@dataclass(frozen=True)
class _Subject:
    """What is verified.

    Attributes:
        names: What was given for model, data and loss.
        model: The model.
        batch: What the loss gets.
        cut: How many of its texts are cut, and to how many tokens; None if none is.
        loss: Returns one loss per sample.
    """

    names: tuple[str, str, str]
    model: nn.Module
    batch: Any
    cut: str | None
    loss: Callable[[nn.Module, Any], Any]

    def losses(self) -> Any:
        return self.loss(self.model, self.batch)

    def described(self) -> Iterable[tuple[str, str]]:
        model, data, loss = self.names
        yield "model", f"{model} ({type(self.model).__name__})"
        yield from described_parameters(self.model)
        yield "data", data
        if isinstance(self.batch, Mapping) and isinstance(self.batch.get("attention_mask"), Tensor):
            mask = self.batch["attention_mask"]
            padding = 100 * float((mask == 0).double().mean())
            shape = " × ".join(map(str, mask.shape))
            yield "batch", f"{shape} tokens, {padding:.0f} % padding"
        if self.cut is not None:
            yield "texts", self.cut
        yield "loss", loss
        yield "mode", "training" if self.model.training else "evaluation"


def _load(options: Verify) -> _Subject:
    """Load model, batch and loss, the cheapest first."""
    function, loss = load_loss(options.loss)
    loaded = load_model(options.model)
    sample = load_batch(
        options.data,
        options.model,
        loaded,
        field=options.field,
        batch_size=options.batch_size,
        truncate=options.truncate,
    )
    place = Place(options.device, options.dtype)
    place.model(loaded)
    names = options.model, options.data, loss
    return _Subject(names, loaded, place.batch(sample.batch), sample.cut, function)


def _print_findings(model: nn.Module, found: Comparison) -> None:
    trainable = [each for each in model.parameters() if each.requires_grad]
    frozen = sum(not each.requires_grad for each in model.parameters())
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for check in found.parameters:
        numbers[check.module, check.sampler].append(prod(check.shape))
    print()
    print_table(
        ("class", "sampler", "parameters", "numbers"),
        ((*key, str(len(sizes)), str(sum(sizes))) for key, sizes in sorted(numbers.items())),
    )
    besides = f", besides {frozen} frozen" if frozen else ""
    rows = ", ".join(map(str, found.samples))
    print(f"\ntracked: {len(found.parameters)} of {len(trainable)} trainable parameters{besides}")
    print(f"compared: samples {rows} of {found.n}\n")
    titles, *checks = found.rows()
    shown = max(_SHOWN, len(found.wrong)) if sys.stdout.isatty() else len(checks)
    print_table(titles, checks[:shown])
    if len(checks) > shown:
        print(f"... and {len(checks) - shown} more, which are within their tolerances")
    print(plain(f"\n{found.verdict}"))
    if found.reason:
        print(plain(found.reason))
