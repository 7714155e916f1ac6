"""What `ghost query` does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghost_core import (
    CaptureError,
    UnknownNameError,
)
from ghost_engines import ProjectedRows, ProjectionEngine, project_queries
from ghost_engines.cli.answers import Answer, Asked, Found, as_json, print_answers
from ghost_engines.cli.asked import asked_for, check_asked
from ghost_engines.cli.corpora import (
    Corpus,
    CorpusOptions,
    corpus_of,
    load_corpus,
    stored_options,
)
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import in_one_line
from ghost_engines.cli.options import Query
from ghost_engines.cli.query_page import write_page
from ghost_engines.cli.subject import Subject
from ghost_engines.cli.tables import one_line, print_error, while_read
from ghost_engines.corpus import SUFFIXES
from ghost_engines.digest import model_digest
from ghost_engines.results import layers
from ghost_engines.search import Whitening, score_parts
from ghost_engines.store import By, GradientStore

logger = logging.getLogger(__name__)

Shown = Callable[[int], str | None]
"""Returns a sample as a text for people, by its id."""


def run(options: Query) -> int:
    """Search, write and print what was found, and return the exit status."""
    _check(options)
    store = GradientStore.open(options.store)
    subject = Subject.load(options, options.loss or _known_loss(store), options.device)
    model = subject.model
    _check_model(model, options, store)
    batch, texts = asked_for(options, model)
    rows = _projected(model, store, subject.losses, batch)
    stored = _stored_texts(options, store, model)
    by: By = Whitening.of(store, options.damping) if options.by == "whitened" else options.by
    asked = Asked(
        store=str(options.store), model=f"{options.model} ({type(model).__name__})",
        loss=subject.loss_name,
        rows=len(store), by=options.by, parameters=options.parameters, smallest=options.smallest,
    )  # fmt: skip
    answers = _answers(options, store, rows, by, texts, stored)
    if options.html is not None:
        write_page(options.html, asked, answers)
    with while_read():
        if options.json:
            print(json.dumps(as_json(asked, answers), indent=1))
        else:
            print_answers(asked, answers)
    return 0


def _check(options: Query) -> None:
    """Refuse what does not fit together before the work is done."""
    check_asked(options)
    if options.k < 1:
        raise CommandError(f"-k must be at least 1, not {options.k}")
    if options.html is not None and not options.html.absolute().parent.is_dir():
        raise CommandError(f"--html: there is no folder {options.html.absolute().parent}")


def _check_model(model: nn.Module, options: Query, store: GradientStore) -> None:
    """Refuse another model than that of the rows, if the store says which that is."""
    known = store.manifest.info.get("model")
    if known is not None and known != model_digest(model):
        raise CommandError(
            f"MODEL: {options.model} is not the model that the store at {options.store} was made "
            f"with: its parameters or buffers have other values, cast to --dtype {options.dtype}"
        )
    if known is None:
        logger.warning(
            "the store at %s does not say with which model it was made: scores are noise if it is "
            "another one", options.store,
        )  # fmt: skip


def _known_loss(store: GradientStore) -> str | None:
    """Return the loss of the store's rows, if it says so in a way that `ghost project` does."""
    known = store.manifest.info.get("loss")
    return known if isinstance(known, str) and (known in ("mean", "sum") or ":" in known) else None


def _projected(model: nn.Module, store: GradientStore, loss: Any, batch: Any) -> ProjectedRows:
    """Return the projected gradients of the queries' own losses."""
    try:
        engine = ProjectionEngine.from_manifest(model, store)
    except (CaptureError, UnknownNameError) as error:
        raise CommandError(f"MODEL does not fit the store: {error}") from error
    with in_one_line("projecting the query"):
        return project_queries(engine, loss, batch, digest=False)  # which has been compared


def _stored_texts(options: Query, store: GradientStore, model: nn.Module) -> Shown | None:
    """Return what shows the samples that the store was made of, if they can be found."""
    if options.data is not None:
        given = _opened(options, options.data, store, model)
        if not _is_data_of(store, given):
            logger.warning(
                "%s is not what the store was made of, or has changed since: what is shown may be "
                "others than the samples that were found", options.data,
            )  # fmt: skip
        return _shown(given)
    try:
        corpus = corpus_of(store, options.model, model)
    except CommandError as error:
        _say_why_not_shown(str(error))
        return None
    if corpus is not None:
        return corpus.shown
    named = [Path(file.path) for file in store.manifest.data_files]
    known = "config" in store.manifest.notes  # which says more than a file's name does
    if known or len(named) != 1 or named[0].suffix not in SUFFIXES or not named[0].is_file():
        return None
    corpus = _opened(options, str(named[0]), store, model)
    if not _is_data_of(store, corpus):
        _say_why_not_shown(f"{named[0]} has changed since the store was made")
        return None
    return _shown(corpus)


def _opened(options: Query, data: str, store: GradientStore, model: nn.Module) -> Corpus:
    """Open data that a store is said to be made of, as it says that they were read."""
    how = stored_options(store, options.model)
    if how is None or options.data_text is not None:
        how = CorpusOptions(data=data, model=options.model, text=options.data_text)
    corpus = load_corpus(replace(how, data=data), model)
    if corpus.shown is None:
        raise CommandError(f"--data: {data} has no texts to show")
    return corpus


def _is_data_of(store: GradientStore, corpus: Corpus) -> bool:
    """Return whether files are those that a store was made of, as they were, if that is known."""
    known = {file.digest for file in store.manifest.data_files}
    return not known or {file.digest for file in corpus.files} <= known


def _shown(corpus: Corpus) -> Shown:
    def shown(id_: int) -> str:
        assert corpus.shown is not None
        try:
            return corpus.shown(id_)
        except IndexError as error:
            raise CommandError(
                f"--data has {len(corpus.samples)} samples, and the store has one with the id "
                f"{id_}: give what it was made of"
            ) from error

    return shown


def _say_why_not_shown(reason: str) -> None:
    said = one_line(f"the texts of the store's samples cannot be shown: {reason}")
    print_error(said)


def _answers(
    options: Query,
    store: GradientStore,
    rows: ProjectedRows,
    by: By,
    texts: list[str] | None,
    stored: Shown | None,
) -> list[Answer]:
    near = store.search(
        rows, options.k, by, largest=not options.smallest, parameters=options.parameters
    )
    parts = {}
    if options.by_layer:
        each = score_parts(store, rows, near.ordinals, by, parameters=options.parameters)
        parts = {
            layer: torch.stack([each[name] for name in names]).sum(0).tolist()
            for layer, names in layers(each).items()
        }
    groups, ids, ordinals = store.groups, near.ids.tolist(), near.ordinals.tolist()

    def one(q: int, at: int, score: float) -> Found:
        return Found(
            id=ids[q][at],
            score=score,
            group=None if groups is None else groups[ordinals[q][at]],
            text=None if stored is None else stored(ids[q][at]),
            layers={layer: part[q][at] for layer, part in parts.items()},
        )

    answers = []
    for q, scores in enumerate(near.scores.tolist()):
        found = [one(q, at, score) for at, score in enumerate(scores)]
        answers.append(Answer(None if texts is None else texts[q], found))
    return answers
