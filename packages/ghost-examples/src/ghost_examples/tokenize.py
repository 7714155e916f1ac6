r"""Turns texts into domains of tokens for `python -m ghost_examples.lm_training --corpus`.

    python -m ghost_examples.tokenize web=web.jsonl code=code.parquet books=books.txt \
        --tokenizer my-model --output corpus

writes `train-web.bin` and `val-web.bin` to the folder `corpus`, each with a `.json` that says what
it holds, and so on for each domain. More domains can be added to the same folder later. Nothing is
downloaded: a tokenizer is a folder that `save_pretrained` has written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from ghost_engines import CorpusError
from ghost_examples.command_line import read_options, refusals
from ghost_examples.language_models import (
    EMBEDDED,
    Cut,
    Source,
    open_tokenizer,
    write_domain,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Attributes:
        inputs: DOMAIN=PATH for each domain: a text (.txt, .md, .rst, .py), documents (.jsonl,
            .parquet), or the folder of a Hugging Face data set that `save_to_disk` has written.
        output: Folder of the corpus; made if missing.
        tokenizer: Folder of a tokenizer of transformers, or "embedded" for the small vocabulary
            that ships with the examples.
        field: What the text is under, in documents.
        length: Tokens of a block, which is a training sample.
        val_every: One document in so many is for validation; of a text, one block.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    output: Path = Path("corpus")
    tokenizer: str = EMBEDDED
    field: str = "text"
    length: int = 128
    val_every: int = 16


def run(asked: Options) -> None:
    """Write all domains, and print what each has."""
    if not asked.inputs:
        raise CorpusError("give at least one DOMAIN=PATH; --help says more")
    sources = [Source.of(given) for given in asked.inputs]
    tokenizer = open_tokenizer(asked.tokenizer)
    print(f"{tokenizer.size} token ids, blocks of {asked.length}")
    for source in sources:
        cut = Cut(asked.length, asked.val_every, by_block=source.is_one_text)
        texts = _shown(source, asked.field)
        found = write_domain(asked.output, source.domain, texts, tokenizer, cut)
        blocks = ", ".join(f"{count} {split}" for split, count in found.blocks.items())
        print(f"{found.domain}: {found.documents} documents, blocks: {blocks}")
    print(asked.output.absolute())


def _shown(source: Source, field: str) -> Iterator[str]:
    """Yield texts with a bar of progress, on a terminal."""
    with tqdm(desc=source.domain, unit="B", unit_scale=True, disable=None) as bar:
        for text in source.texts(field):
            yield text
            bar.update(len(text))


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line; exits with 2 where options or files do not fit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    asked = read_options(Options, arguments, name="tokenize", description=__doc__)
    with refusals(OSError):
        run(asked)


if __name__ == "__main__":
    main()
