"""What `ghost query` is asked for: texts, a prompt or a conversation, or data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ghost_engines.cli.batches import batch_of
from ghost_engines.cli.corpora import Corpus, CorpusOptions, load_corpus
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.models import positions_of, tokenizer_of
from ghost_engines.cli.options import Query
from ghost_engines.corpus import TEXT, Examples, Records
from ghost_engines.ids import ID_FIELD

_ITSELF = ("prompt", "completion", "messages")
"""Options that are what is asked for, unless there is a file, of which they are fields."""


def check_asked(options: Query) -> None:
    """Refuse options of which nobody knows what is asked for.

    Raises:
        CommandError: If there is nothing, or too much.
    """
    if options.file is not None:
        if len(options.text) > 1:
            raise CommandError("with --file, --text is the field of the text: give one")
    elif not options.text and all(getattr(options, name) is None for name in _ITSELF):
        raise CommandError(
            "give --text, --prompt and --completion, --messages or --file: what is asked for"
        )
    else:
        for name in ("block", "domains"):
            if getattr(options, name) is not None:
                raise CommandError(f"--{name} is for --file, and none is given")
    _read(options).check()


def asked_for(options: Query, loaded: nn.Module) -> tuple[Any, list[str] | None]:
    """Return what is asked for as a batch, and its texts, if it has any.

    Args:
        options: Those of the command.
        loaded: The model, for its largest number of positions.

    Raises:
        CommandError: If it cannot be read.
        MissingExtraError: If a library for it is not installed.
    """
    read = _read(options)
    corpus = _given(options, read, loaded) if options.file is None else load_corpus(read, loaded)
    if corpus.made:
        return corpus.samples, None
    rows = range(len(corpus.samples))
    batch = batch_of(corpus, read, rows)
    return batch, None if corpus.shown is None else [*_texts(corpus, rows)]


def _read(options: Query) -> CorpusOptions:
    """Return how what is asked for is read."""
    text = options.text[0] if options.text else None
    if options.file is None:
        return CorpusOptions.of(options, "", options.model, _option(options), text)
    return CorpusOptions.of(options, options.file, options.model, "--file", text)


def _option(options: Query) -> str:
    given = [name for name in _ITSELF if getattr(options, name) is not None]
    return f"--{given[0] if given else TEXT}"


def _given(options: Query, read: CorpusOptions, loaded: nn.Module) -> Corpus:
    """Return what was given in the shell itself."""
    values: Sequence[Mapping[str, Any]] = [{TEXT: each} for each in options.text]
    if options.messages is not None:
        values = [{"messages": _conversation(options.messages)}]
    elif options.prompt is not None:
        values = [{"prompt": options.prompt, "completion": options.completion}]
    records = _Given(read.option, values)
    tokenizer = tokenizer_of(options.model, read.option)
    form, positions = type(read.form)(), positions_of(loaded)  # its fields have their own names
    texts = Examples(records, form, tokenizer, truncate=read.truncate, positions=positions)
    return Corpus(texts, shown=texts.text)


def _conversation(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(
            "--messages is no JSON",
            reason="without --file, it is the conversation to ask for",
            remedy="""give '[{"role": "user", "content": "..."}, ...]', or --file with its field""",
        ) from error


def _texts(corpus: Corpus, rows: Sequence[int]) -> Iterator[str]:
    """Yield samples as texts for people, which go by their ids, if they have some."""
    assert corpus.shown is not None
    for row in rows:
        yield corpus.shown(corpus.samples[row].get(ID_FIELD, row))


@dataclass(frozen=True)
class _Given(Records):
    """Records that were given in the shell."""

    option: str
    values: Sequence[Mapping[str, Any]]

    @property
    def path(self) -> Path:  # type: ignore[override]  # nobody writes it
        return Path(self.option)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.values[index]

    def called(self, index: int) -> str:
        return f"text {index + 1}" if self.option == "--text" else "it"
