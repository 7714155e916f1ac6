"""What `ghost score` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ghost_core import UnsupportedLayerError, WrongSplitError
from ghost_engines.cli.batches import Data, load_data
from ghost_engines.cli.corpora import CorpusOptions
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import in_one_line
from ghost_engines.cli.options import Score
from ghost_engines.cli.outputs import check_outputs, print_extremes, write_outputs
from ghost_engines.cli.subject import Subject, refused
from ghost_engines.cli.tables import print_table, while_read
from ghost_engines.dataset import ScoreTable, score_dataset

_DATA, _TARGETS = "--data", "--targets"


def run(options: Score) -> int:
    """Score, write and print what was found, and return the exit status."""
    targets = _named(options.targets)
    if not targets and options.engine == "dot_product":
        raise CommandError(f"{_TARGETS}: give at least one, as NAME=DATA")
    check_outputs(options.top, options.out, options.plot)
    subject = Subject.load(options, options.loss, options.device)
    try:
        data = _loaded(options, targets, subject)
        table = _scored(options, data, subject)
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
        if (domains := data[_DATA].domains) is not None:
            _print_domains(table, domains(torch.from_numpy(table.ids)))
    return 0


def _loaded(options: Score, targets: dict[str, str], subject: Subject) -> dict[str, Data]:
    """Load the data, and those of each target, by the options that name them."""
    given = {_DATA: options.data} | {f"{_TARGETS} {name}": targets[name] for name in targets}
    return {
        option: load_data(how, subject.model, batch_size=options.batch_size)
        for option, how in _read_as(options, given).items()
    }


def _scored(options: Score, data: dict[str, Data], subject: Subject) -> ScoreTable:
    with in_one_line("scoring"):
        return score_dataset(
            subject.model,
            subject.losses,
            data[_DATA].batches,
            {
                option.removeprefix(f"{_TARGETS} "): each.batches
                for option, each in data.items()
                if option != _DATA
            },
            norms=not options.no_norms,
            engine=options.engine,
            ids=options.ids,
            batch_size=options.batch_size,
            layers=options.layers,
            exclude=options.exclude,
        )


def _print_domains(table: ScoreTable, domains: list[str]) -> None:
    """Print how many samples each domain has, and the means of their scores and norms."""
    names, columns = np.array(domains), [*table.scores.T]
    titles = ["domain", "samples", *(f"mean score {name}" for name in table.names)]
    if table.norms is not None:
        titles.append("mean norm")
        columns.append(table.norms)
    print()
    print_table(
        titles,
        (
            (name, str(int(there.sum())), *(f"{column[there].mean():.6g}" for column in columns))
            for name in dict.fromkeys(domains)
            for there in [names == name]
        ),
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
            raise CommandError(f"{_TARGETS}: {text!r} is not of the form NAME=DATA")
        if name in found:
            raise CommandError(f"{_TARGETS}: there are two of the name {name!r}")
        found[name] = data
    return found
