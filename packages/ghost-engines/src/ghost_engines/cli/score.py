"""What `ghost score` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ghost_core import UnsupportedLayerError, WrongSplitError
from ghost_engines.cli.batches import check_field, load_data
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import in_one_line, reporting
from ghost_engines.cli.losses import load_loss
from ghost_engines.cli.models import load_model
from ghost_engines.cli.options import Score
from ghost_engines.cli.outputs import check_outputs, print_extremes, write_outputs
from ghost_engines.cli.places import Place, described_parameters, seed
from ghost_engines.cli.tables import plain, print_table, while_read
from ghost_engines.dataset import ScoreTable, score_dataset


def run(options: Score) -> int:
    """Score, write and print what was found, and return the exit status."""
    seed(options.seed)
    targets = _named(options.targets)
    if not targets and options.engine == "dot_product":
        raise CommandError("--targets: give at least one, as NAME=DATA")
    check_field(options.field, [options.data, *targets.values()])
    check_outputs(options.top, options.out, options.plot)
    loss, loss_name = load_loss(options.loss)
    model = load_model(options.model)
    try:
        table = _scored(options, targets, model, loss)
    except (UnsupportedLayerError, WrongSplitError) as error:
        with while_read():
            print(plain(f"refused: {error}"))
        return 1
    described = reporting(lambda: [*described_parameters(model)], "MODEL: looking at it")()
    write_outputs(table, table.plot, options.out, options.plot)
    summary = [
        ("model", f"{options.model} ({type(model).__name__})"),
        *described,
        ("data", options.data),
        *((f"target {name}", data) for name, data in targets.items()),
        ("loss", loss_name),
        ("samples", str(len(table))),
        ("verified", "yes" if table.verified else "no"),
    ]
    beside = {} if table.norms is None else {"norm": table.norms}
    with while_read():
        print_table(("property", "value"), summary)
        print_extremes(
            table.ids, table.scores, table.names, beside,
            what="score", top=options.top, signed=table.signed,
        )  # fmt: skip
    return 0


def _scored(
    options: Score,
    targets: dict[str, str],
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
) -> ScoreTable:
    """Load the data and score them."""
    place = Place(options.device, options.dtype)
    place.model(model)

    def load(data: str, option: str) -> Any:
        return load_data(
            data, option, options.model, model,
            field=options.field, batch_size=options.batch_size, truncate=options.truncate,
        )  # fmt: skip

    train = load(options.data, "--data")
    loaded = {name: load(data, f"--targets {name}") for name, data in targets.items()}
    with in_one_line("scoring"):
        return score_dataset(
            model,
            lambda model, batch: loss(model, place.batch(batch)),
            train,
            loaded,
            norms=not options.no_norms,
            engine=options.engine,
            ids=options.ids,
            batch_size=options.batch_size,
            layers=options.layers,
            exclude=options.exclude,
        )


def _named(texts: Sequence[str]) -> dict[str, str]:
    """Return data by the name of their target."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, data = text.partition("=")
        if not name or not data:
            raise CommandError(f"--targets: {text!r} is not of the form NAME=DATA")
        if name in found:
            raise CommandError(f"--targets: there are two of the name {name!r}")
        found[name] = data
    return found
