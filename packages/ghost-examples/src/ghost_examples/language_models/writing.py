"""Cuts the documents of a domain into blocks of tokens for training and validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ghost_engines import CorpusError, TokenWriter
from ghost_engines.corpus import BLOCKS_PER_DOMAIN, domain_number, token_path
from ghost_examples.language_models.tokenizers import Tokenizer

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Cut:
    """How documents become blocks.

    Attributes:
        length: Tokens of a block.
        val_every: One document in so many is for validation.
        by_block: Whether the documents are parts of one long text, of which one block in so many is
            for validation instead. They have no end tokens.
    """

    length: int
    val_every: int
    by_block: bool = False

    def __post_init__(self) -> None:
        if self.length < 2:
            raise CorpusError(f"length must be at least 2, not {self.length}: one token to predict")
        if self.val_every < 2:
            raise CorpusError(f"val_every must be at least 2, not {self.val_every}")


@dataclass(frozen=True)
class Written:
    """What was written of a domain.

    Attributes:
        domain: Its name.
        documents: Number of documents.
        blocks: Number of blocks by split.
    """

    domain: str
    documents: int
    blocks: dict[str, int]


def write_domain(
    folder: Path, domain: str, documents: Iterable[str], tokenizer: Tokenizer, cut: Cut
) -> Written:
    """Write the blocks of a domain, `train-{domain}.bin` and `val-{domain}.bin`.

    Documents follow one another, each ended by the tokenizer's end token, and blocks may begin and
    end inside of them. What is left at the end of a split and fills no block is never read.

    Args:
        folder: Where to; the domain gets the number there that it has, or the next.
        domain: Its name.
        documents: Its texts, which are read one after another.
        tokenizer: Turns them into tokens.
        cut: How.

    Raises:
        CorpusError: If the domain is there already, or its text does not fill a block for each of
            both. Then nothing is written.
    """
    first = domain_number(folder, domain) * BLOCKS_PER_DOMAIN
    writers = {
        split: TokenWriter(
            token_path(folder, split, domain),
            vocabulary=tokenizer.size,
            length=cut.length,
            first_id=first,
            tokenizer=tokenizer.name,
        )
        for split in (TRAIN, VAL)
    }
    count = 0
    end = [] if cut.by_block or tokenizer.end is None else [tokenizer.end]

    def counted() -> Iterator[Sequence[int]]:
        nonlocal count
        for text in documents:
            count += 1
            yield [*tokenizer.encode(text), *end]

    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(writer)
        parts = _blocks(counted(), cut.length) if cut.by_block else counted()
        for at, part in enumerate(parts):
            # Not the first one, so that a domain of few still has some to train on.
            split = VAL if at % cut.val_every == cut.val_every // 2 else TRAIN
            writers[split].append(part)
        blocks = {split: writer.tokens // cut.length for split, writer in writers.items()}
        if not all(blocks.values()):
            what = "blocks" if cut.by_block else "documents"
            raise CorpusError(
                f"domain {domain!r} is too short: {blocks[TRAIN]} blocks to train on and "
                f"{blocks[VAL]} for validation",
                reason=f"it has {count} documents; one in {cut.val_every} {what} is for "
                f"validation, and blocks have {cut.length} tokens",
                remedy="give more text, or a smaller length or val_every",
            )
    return Written(domain, count, blocks)


def _blocks(parts: Iterable[Sequence[int]], length: int) -> Iterator[Sequence[int]]:
    """Yield whole blocks of the tokens of all parts."""
    rest: list[int] = []
    for part in parts:
        rest.extend(part)
        whole = len(rest) // length * length
        yield from (rest[start : start + length] for start in range(0, whole, length))
        del rest[:whole]
