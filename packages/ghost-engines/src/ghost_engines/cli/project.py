"""What `ghost project` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_core import UnsupportedLayerError, WrongSplitError
from ghost_engines.cli.corpora import Corpus, CorpusOptions, load_corpus
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import in_one_line
from ghost_engines.cli.given import changed
from ghost_engines.cli.options import Project
from ghost_engines.cli.ranks import Ranks
from ghost_engines.cli.store_folder import check_folder
from ghost_engines.cli.subject import Subject, refused
from ghost_engines.cli.tables import print_table, while_read
from ghost_engines.dataset import ProjectedData, project_dataset
from ghost_engines.files import write_json
from ghost_engines.store import GradientStore, OtherRowsError

REPORT = "project.json"
"""Where a store has the config and the statistics of the last pass."""

_SHOWN = 6
"""Differences between a store and what would be appended that an error names."""


def run(options: Project) -> int:
    """Project, print what was done, and return the exit status."""
    check_folder(options.store)
    projection, ranks = _projection(options), Ranks.now()
    subject = Subject.load(options, options.loss, ranks.device(options.device))
    how = CorpusOptions.of(options, options.data, options.model, "--data", options.text)
    corpus = load_corpus(how, subject.model)
    try:
        done = _projected(options, projection, corpus, subject, ranks)
    except (UnsupportedLayerError, WrongSplitError) as error:
        return refused(error)
    groups = list(_groups(done.store))
    _report(options, done, groups, ranks)
    if ranks.rank:
        return 0
    described = subject.described(options.model)
    with while_read():
        print_table(
            ("property", "value"),
            [
                *described,
                ("data", options.data),
                ("loss", subject.loss_name),
                ("store", str(done.store.path)),
                ("dimensions", str(done.store.k_total)),
                ("samples", str(len(done.store))),
                ("projected now", str(done.samples)),
                ("tokens now", str(done.tokens)),
                ("seconds", f"{done.seconds:.1f}"),
                *([] if ranks.world == 1 else [("process", f"0 of {ranks.world}")]),
            ],
        )
        print()
        print_table(("domain", "samples", "mean loss", "mean norm"), groups)
    return 0


def effective(options: Project) -> dict[str, Any]:
    """Return all options as they are in effect, as JSON can say them."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
        if name != "config"
    }


def _projection(options: Project) -> dict[str, Any]:
    """Return the options of the engine."""
    return {
        "dim": None if options.dim is None else _dim("--dim", options.dim),
        "total_dim": options.total_dim,
        "min_dim": options.min_dim,
        "dims": dict(_named_dims(options.dims)),
        "sketch": options.sketch,
        "seed": options.seed,
        "init": options.init,
        "dtype": options.storage,
        "unit_norm": options.unit_norm,
        "layers": options.layers,
        "exclude": options.exclude,
    }


def _named_dims(texts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for text in texts:
        name, _, dim = text.rpartition("=")
        if not name:
            raise CommandError(f"--dims: {text!r} is not of the form GLOB=DIM")
        yield name, _dim("--dims", dim)


def _dim(option: str, text: str) -> Any:
    if text == "whole":
        return text
    try:
        sides = [int(part) for part in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise CommandError(f"{option}: {text!r} is no number, no LEFTxRIGHT, and not 'whole'")
    return sides[0] if len(sides) == 1 else tuple(sides)


def _projected(
    options: Project,
    projection: dict[str, Any],
    corpus: Corpus,
    subject: Subject,
    ranks: Ranks,
) -> ProjectedData:
    batch_size = options.batch_size
    if batch_size is None and options.tokens_per_batch is None:
        batch_size = 16
    try:
        with in_one_line("projecting", OSError):
            return project_dataset(
                subject.model,
                subject.losses,
                corpus.samples,
                options.store,
                ids=options.ids,
                batch_size=batch_size,
                tokens_per_batch=options.tokens_per_batch,
                columns=corpus.columns,
                unit=options.unit,
                part=None if ranks.world == 1 else (ranks.rank, ranks.world),
                progress=False if ranks.rank else None,
                info={"loss": options.loss},
                files=corpus.files,
                notes={"config": effective(options)},
                **projection,
            )
    except OtherRowsError as error:
        raise _other_rows(options, error) from error


def _other_rows(options: Project, error: OtherRowsError) -> CommandError:
    """Name the options that the store was not made with first, and what they change after."""
    stored, now = error.stored, error.now
    before = stored.notes.get("config")
    found = [*changed(before, effective(options))] if isinstance(before, dict) else []
    models = [each.info.get("model") for each in (stored, now)]
    if models[0] != models[1]:
        found.append(f"MODEL: {options.model} is another model than that of the store")
        now = replace(now, info={**now.info, "model": models[0]})
    found += stored.differences(now)
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    empty = (
        ""
        if len(GradientStore.open(options.store))
        else "remove the store, which has no rows, if nobody writes it; or "
    )
    return CommandError(
        f"the rows would not be those of the store at {options.store}: "
        f"{'; '.join(found[:_SHOWN])}{more}",
        reason=error.reason,
        remedy=f"{empty}give the options that the store was made with, which `ghost store info` "
        "prints, or another folder as --store",
    )


def _groups(store: GradientStore) -> Iterator[tuple[str, ...]]:
    """Yield name, number of samples, mean loss and mean norm of each domain, or of all samples."""
    parts = {"all": torch.ones(len(store), dtype=torch.bool)}
    if (labels := store.groups) is not None:
        parts = {name: labels.equal(name) for name in labels.names}
    columns = [store.losses, store.columns["norm"]]
    for name, rows in parts.items():
        values = [each[rows] for each in columns if isinstance(each, Tensor)]
        yield (
            name,
            str(int(rows.sum())),
            *(f"{float(each.double().mean()):.6g}" for each in values),
        )


def _report(
    options: Project, done: ProjectedData, groups: Sequence[tuple[str, ...]], ranks: Ranks
) -> None:
    """Write config and statistics beside the rows: a file for each process."""
    titles = ("domain", "samples", "mean_loss", "mean_norm")
    content = {
        "config": effective(options),
        "samples": done.samples,
        "skipped": done.skipped,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "domains": [dict(zip(titles, group, strict=True)) for group in groups],
    }
    root = done.store.path
    name = REPORT if ranks.world == 1 else f"project-{ranks.rank}-of-{ranks.world}.json"
    write_json(root / name, content, root)
