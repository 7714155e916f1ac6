"""What `ghost score` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ghost_core import UnsupportedLayerError, WrongSplitError
from ghost_engines.cli.batches import load_data
from ghost_engines.cli.corpora import CorpusOptions
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import in_one_line
from ghost_engines.cli.options import Score
from ghost_engines.cli.outputs import check_outputs, print_extremes, write_outputs
from ghost_engines.cli.subject import Subject, refused
from ghost_engines.cli.tables import print_table, while_read
from ghost_engines.dataset import ScoreTable, score_dataset


def run(options: Score) -> int:
    """Score, write and print what was found, and return the exit status."""
    targets = _named(options.targets)
    if not targets and options.engine == "dot_product":
        raise CommandError("--targets: give at least one, as NAME=DATA")
    check_outputs(options.top, options.out, options.plot)
    subject = Subject.load(options, options.loss, options.device)
    try:
        table = _scored(options, targets, subject)
    except (UnsupportedLayerError, WrongSplitError) as error:
        return refused(error)
    described = subject.described(options.model)
    write_outputs(table, table.plot, options.out, options.plot)
    summary = [
        *described,
        ("data", options.data),
        *((f"target {name}", data) for name, data in targets.items()),
        ("loss", subject.loss_name),
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


def _scored(options: Score, targets: dict[str, str], subject: Subject) -> ScoreTable:
    """Load the data and score them."""
    given = {"--data": options.data} | {f"--targets {name}": targets[name] for name in targets}
    how = _read_as(options, given)
    loaded = {
        option: load_data(each, subject.model, batch_size=options.batch_size)
        for option, each in how.items()
    }
    train = loaded.pop("--data")
    with in_one_line("scoring"):
        return score_dataset(
            subject.model,
            subject.losses,
            train,
            dict(zip(targets, loaded.values(), strict=True)),
            norms=not options.no_norms,
            engine=options.engine,
            ids=options.ids,
            batch_size=options.batch_size,
            layers=options.layers,
            exclude=options.exclude,
        )


def _read_as(options: Score, given: dict[str, str]) -> dict[str, CorpusOptions]:
    """Return how each of several data is read, by its option.

    The field of the text is that of data with fields; others among them have none, and need none.
    """
    how = {
        option: CorpusOptions.of(options, data, options.model, option, options.text)
        for option, data in given.items()
    }
    if any(each.has_fields for each in how.values()):
        how = {
            option: each if each.has_fields else replace(each, text=None)
            for option, each in how.items()
        }
    return how


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
