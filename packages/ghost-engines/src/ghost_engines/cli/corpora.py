"""Finds a whole corpus: texts with a form, token ids, domains, or what a function returns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ghost_core import UnknownNameError
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function
from ghost_engines.cli.models import is_folder, load_tokenizer, positions_of, tokenizer_of
from ghost_engines.cli.reading import DataOptions, Reading
from ghost_engines.cli.token_files import TOKENS, open_tokens
from ghost_engines.corpus import (
    BLOCKS_PER_DOMAIN,
    SUFFIXES,
    Blocks,
    CorpusError,
    Examples,
    Form,
    MessagesForm,
    Mixture,
    PromptForm,
    Records,
    TextForm,
    TokenCorpus,
    named,
    open_records,
)
from ghost_engines.store import DataFile, GradientStore

Column = tuple[str, Callable[[Tensor], Any]]
"""A dtype as stores declare it, and the values of samples by their ids."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(DataOptions):
    """How a corpus is read.

    Attributes:
        data: What is given as data.
        model: What the model was loaded from, for its tokenizer.
        option: The option that names the data, for errors.
    """

    data: str
    model: str
    option: str = "--data"

    @classmethod
    def of(cls, options: Reading, data: str, model: str, option: str, text: str | None) -> Self:
        """Return how data are read by the options of a command, with the field of their texts."""
        names = [entry.name for entry in fields(Reading)]
        given = {name: getattr(options, name) for name in names}
        return cls(data=data, model=model, option=option, text=text, **given)

    @property
    def form(self) -> Form:
        """What a record is.

        Raises:
            CommandError: If options exclude each other.
        """
        given = [name for name in ("text", "prompt", "messages") if getattr(self, name)]
        if len(given) > 1:
            raise CommandError(f"--{given[0]} and --{given[1]} exclude each other: give one")
        if (self.prompt is None) != (self.completion is None):
            raise CommandError("--prompt and --completion go together: give both")
        if self.prompt is not None and self.completion is not None:
            return PromptForm(self.prompt, self.completion)
        return (
            TextForm(self.text or "text") if self.messages is None else MessagesForm(self.messages)
        )

    @property
    def has_fields(self) -> bool:
        """Whether the data have records with fields, so that a text is under one of them."""
        path = Path(self.data)
        named_so = path.suffix in SUFFIXES and path.suffix != ".txt"
        return named_so or self.domains is not None or (path.is_dir() and not named(path))

    def refuse_texts(self, what: str) -> None:
        """Refuse options that are for texts.

        Raises:
            CommandError: If there is one.
        """
        for name in ("text", "prompt", "completion", "messages", "block"):
            if getattr(self, name) is not None:
                raise CommandError(f"--{name} is for texts: {self.data} {what}")

    def check(self) -> Form:
        """Return what a record is, if options go together and cut or pack something.

        Raises:
            CommandError: If they do not.
        """
        for name in ("truncate", "block"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise CommandError(f"--{name} must be at least 1, not {number}")
        if self.truncate is not None and self.block is not None:
            raise CommandError("--truncate and --block exclude each other: give one")
        return self.form


@dataclass(frozen=True)
class Corpus:
    """A corpus.

    Attributes:
        samples: The data set.
        columns: What else is known of each sample, by name, as `project_dataset` takes it.
        digested: Reads the files that it is read from, and returns them with their digests.
        shown: Returns a sample as a text for people, by its id; None if it has none.
        made: Whether a function made it, and may have made anything.
    """

    samples: Any
    columns: Mapping[str, Column] = field(default_factory=dict)
    digested: Callable[[], Sequence[DataFile]] = tuple
    shown: Callable[[int], str] | None = None
    made: bool = False

    @cached_property
    def files(self) -> Sequence[DataFile]:
        """The files, which are read as a whole for their digests once somebody asks."""
        return self.digested()


def load_corpus(
    options: CorpusOptions,
    loaded: nn.Module,
    *,
    limit: int | None = None,
    unasked: int | None = None,
) -> Corpus:
    """Open a corpus; texts are read and made tokens when they are asked for.

    Args:
        options: How.
        loaded: The model, for its largest number of positions.
        limit: How many texts of a file to look for at most, where they are not packed.
        unasked: Tokens to take of each text of a file, and not more than the model takes, where
            nobody said how they are cut or packed: for a look at some of them.

    Raises:
        CommandError: If there is none, or options do not go with it.
        MissingExtraError: If a library for it is not installed.
    """
    form, path = options.check(), Path(options.data)
    try:
        if options.domains is not None or (path.is_dir() and named(path)):
            return _domains(options, path, form, loaded)
        records = open_records(path, limit if options.block is None else None)
        if records is not None:
            if options.truncate is None and options.block is None and unasked is not None:
                options = replace(options, truncate=min(unasked, positions_of(loaded) or unasked))
            texts = _texts(options, records, form, loaded)
            columns = _places({0: texts}) if isinstance(texts, Examples) else {}
            return Corpus(texts, columns, lambda: _files([records]), texts.text)
        if path.suffix in TOKENS:
            options.refuse_texts("has token ids")
            rows = open_tokens(path, options.option, options.truncate)
            return Corpus(rows, digested=lambda: [DataFile.of(path)])
    except OSError as error:
        why = error.strerror or error
        raise CommandError(f"{options.option}: {path} cannot be read: {why}") from error
    except (CorpusError, UnknownNameError) as error:
        raise CommandError(f"{options.option}: {error}") from error
    return _made(options, path)


def _made(options: CorpusOptions, path: Path) -> Corpus:
    """Return what a function makes."""
    if path.is_dir() and (names := [*_text_files(path)]):
        raise CommandError(
            f"{options.option}: {path} is a folder with files of texts: say which to read, "
            f"--domains {','.join(names)}"
        )
    if ":" not in options.data:
        raise CommandError(
            f"{options.option}: {options.data} is neither a {', '.join((*SUFFIXES, *TOKENS))} "
            "file, nor a folder of token memmaps or of a data set, nor module:function"
        )
    options.refuse_texts("decides itself")
    if options.truncate is not None:
        raise CommandError(f"--truncate is for files: {options.data} decides itself")
    return Corpus(find_function(options.data, options.option)(), made=True)


def corpus_of(store: GradientStore, model: str, loaded: nn.Module) -> Corpus | None:
    """Open the corpus that `ghost project` made a store of, as it was read then.

    Args:
        store: The store.
        model: What the model was loaded from, for its tokenizer.
        loaded: The model.

    Returns:
        The corpus; None if the store does not say how it was read.

    Raises:
        CommandError: If the files are not there any more, or are others now.
    """
    how, files = stored_options(store, model), store.manifest.data_files
    if how is None or not files:
        return None
    if not Path(how.data).exists():  # its path may have been relative to another folder
        first = Path(files[0].path)
        inside = how.domains is not None or first.suffix == ".bin"
        how = replace(how, data=str(first.parent if inside else first))
    corpus = load_corpus(how, loaded)
    for known, found in zip_longest(files, corpus.files):
        if known is None or found is None or known.digest != found.digest:
            changed = (found or known).path
            raise CommandError(f"{changed} has changed since the store was made")
    return corpus


def stored_options(store: GradientStore, model: str) -> CorpusOptions | None:
    """Return how the data of a store were read, if it is one by `ghost project`.

    Args:
        store: The store.
        model: What the model was loaded from, for its tokenizer.
    """
    config = store.manifest.notes.get("config")
    names = {"data", *(entry.name for entry in fields(DataOptions))}
    if not isinstance(config, dict) or not names <= config.keys():
        return None
    return CorpusOptions(model=model, **{name: config[name] for name in names})


def _texts(
    options: CorpusOptions, records: Records, form: Form, loaded: nn.Module
) -> Examples | Blocks:
    tokenizer = tokenizer_of(options.model, f"{options.option}: {records.path}")
    if options.block is not None:
        return Blocks(records, form, tokenizer, block=options.block)
    return Examples(
        records, form, tokenizer, truncate=options.truncate, positions=positions_of(loaded)
    )


def _domains(options: CorpusOptions, folder: Path, form: Form, loaded: nn.Module) -> Corpus:
    """Open domains of tokens, or of texts."""
    names = None if options.domains is None else _listed(options.domains)
    if named(folder):
        options.refuse_texts("has token ids")
        if options.truncate is not None:
            raise CommandError(f"--truncate is for texts: {folder} has blocks of tokens")
        corpus = TokenCorpus.open(folder, options.split, names)
        files = [
            DataFile(str(each.path.absolute()), f"sha256:{each.format.sha256}")
            for each in corpus.domains.values()
        ]
        tokenizer = cache(lambda: load_tokenizer(Path(options.model)))

        def groups(ids: Tensor) -> list[str]:
            return [corpus.domain_of(number) for number in ids.tolist()]

        def shown(number: int) -> str:
            return str(tokenizer().decode(corpus.by_id(number).tolist()))

        known = shown if is_folder(options.model) else None
        return Corpus(corpus, {"group": ("category", groups)}, lambda: files, known)
    there = _text_files(folder)
    there |= {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    found: dict[str, Examples | Blocks] = {}
    records: list[Records] = []
    for name in names or ():
        opened = open_records(there[name]) if name in there else None
        if opened is None:
            raise UnknownNameError("domain", name, there, f"They are in {folder}.")
        records.append(opened)
        found[name] = _texts(options, opened, form, loaded)
    mixture = Mixture(found)
    columns: dict[str, Column] = {"group": ("category", mixture.groups)}
    apart = {at: each for at, each in enumerate(found.values()) if isinstance(each, Examples)}
    return Corpus(mixture, columns | _places(apart), lambda: _files(records), mixture.text)


def _text_files(folder: Path) -> dict[str, Path]:
    """Return the files of texts in a folder, by the names of their domains."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}


def _listed(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names) or not all(names):
        raise CommandError(f"--domains: {text!r} names none, or one twice")
    return names


def _places(examples: Mapping[int, Examples]) -> dict[str, Column]:
    """Return where samples begin and end in their files, as columns, if that is known of all."""
    known = {}
    for at, each in examples.items():
        if (places := each.records.places) is None:
            return {}
        known[at] = places

    def side(which: int) -> Callable[[Tensor], Tensor]:
        def values(ids: Tensor) -> Tensor:
            parts = [divmod(number, BLOCKS_PER_DOMAIN) for number in ids.tolist()]
            found = [known[source][which][position] for source, position in parts]
            return torch.tensor(np.array(found, dtype=np.int64))

        return values

    def sources(ids: Tensor) -> Tensor:
        return (ids // BLOCKS_PER_DOMAIN).int()

    if not known:
        return {}
    return {"source": ("int32", sources), "begin": ("int64", side(0)), "end": ("int64", side(1))}


def _files(records: Sequence[Records]) -> list[DataFile]:
    found = []
    for each in records:
        if each.files == [each.path]:
            found.append(DataFile.of(each.path))
            continue
        digests = [DataFile.of(path).digest for path in each.files]
        whole = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        found.append(DataFile(str(each.path.absolute()), f"sha256 of parts:{whole}"))
    return found
