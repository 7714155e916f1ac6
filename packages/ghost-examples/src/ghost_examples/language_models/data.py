"""The corpus that a language model is trained on, and the order of its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Sampler

from ghost_engines import CorpusError, TokenCorpus
from ghost_engines.corpus import token_path
from ghost_engines.processes import process_count, process_rank
from ghost_examples.language_models.tokenizers import EMBEDDED, Tokenizer, open_tokenizer
from ghost_examples.language_models.writing import TRAIN, VAL, Cut, write_domain
from ghost_examples.texts import DOMAINS, load_domain

VAL_EVERY = 16
"""One block in so many of the embedded texts is for validation."""


@dataclass(frozen=True)
class Corpora:
    """What is trained on, and what tells whether that helps.

    Attributes:
        train: To train on.
        val: For validation; the same domains.
    """

    train: TokenCorpus
    val: TokenCorpus

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the corpus was made with; None if its sidecars name none.

        Raises:
            CorpusError: If it is not where it was.
        """
        return open_tokenizer(self.train.tokenizer) if self.train.tokenizer else None


def open_corpora(corpus: str, domains: Sequence[str], length: int, scratch: Path) -> Corpora:
    """Open domains of a corpus, and make the embedded one first.

    Args:
        corpus: "embedded", or a folder of `{split}-{domain}.bin` with sidecars.
        domains: Names of domains; all if there are none.
        length: Tokens of a block, for the embedded corpus; others have their own.
        scratch: Where the embedded corpus is put.

    Raises:
        CorpusError: If files are missing or malformed, or training and validation do not go
            together; it names the files that are expected.
        UnknownNameError: If there is no such domain.
    """
    folder = Path(corpus)
    if corpus == EMBEDDED:
        folder = scratch / f"embedded-{length}"
        if process_rank() == 0:
            _write_embedded(folder, length)
        if distributed.is_initialized():
            distributed.barrier()
    train = TokenCorpus.open(folder, TRAIN, domains or None)
    val = TokenCorpus.open(folder, VAL, domains or tuple(train.domains))
    for name in ("vocabulary", "length", "tokenizer"):
        if getattr(train, name) != getattr(val, name):
            raise CorpusError(
                f"training and validation data in {folder} differ in their {name}: "
                f"{getattr(train, name)!r} and {getattr(val, name)!r}"
            )
    for corpus_, split in ((train, TRAIN), (val, VAL)):
        if empty := [name for name, each in corpus_.domains.items() if not len(each)]:
            raise CorpusError(f"{token_path(folder, split, empty[0])} has no whole block")
    return Corpora(train, val)


class Batches(Sampler[list[int]]):
    """The positions of the samples of each step, on this process, in an order that a seed tells.

    Each epoch is another permutation, and a step's batch depends on nothing but the seed and its
    number: a run that is resumed goes on as if it had not stopped.

    Args:
        samples: Number of samples.
        size: Samples of a batch on each process.
        steps: First step and end.
        seed: Decides the order.

    Raises:
        CorpusError: If there are fewer samples than a step takes.
    """

    def __init__(self, samples: int, size: int, steps: range, seed: int) -> None:
        self._samples, self._size, self._steps, self._seed = samples, size, steps, seed
        self._share = size * process_count()
        if samples < self._share:
            raise CorpusError(
                f"a step takes {self._share} blocks, and there are {samples} to train on",
                remedy="give more text or a smaller batch",
            )

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self._samples // self._share
        epoch, order = -1, torch.empty(0)
        for step in self._steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(self._seed + epoch)
                order = torch.randperm(self._samples, generator=generator)
            start = step % per_epoch * self._share + process_rank() * self._size
            yield order[start : start + self._size].tolist()


def loader(corpus: TokenCorpus, batches: Batches, workers: int) -> DataLoader[Any]:
    """Return batches of `input_ids` `[N, T]` and `sample_id` `[N]`, both int64."""
    # With a generator of its own it draws nothing from the one that dropout draws from.
    return DataLoader(
        corpus, batch_sampler=batches, num_workers=workers, generator=torch.Generator()
    )


def blocks(corpus: TokenCorpus, domain: str, start: int, count: int) -> Tensor:
    """Return blocks of a domain, `[count, T]`, beginning anew at its end."""
    data = corpus.domains[domain]
    return torch.stack([data[(start + at) % len(data)]["input_ids"] for at in range(count)])


def _write_embedded(folder: Path, length: int) -> None:
    tokenizer = open_tokenizer(EMBEDDED)
    cut = Cut(length, VAL_EVERY, by_block=True)
    for domain in DOMAINS:
        sidecars = [
            token_path(folder, split, domain.name).with_suffix(".json") for split in (TRAIN, VAL)
        ]
        if all(sidecar.exists() for sidecar in sidecars):
            continue
        for sidecar in sidecars:  # one of both: a process was killed between them
            sidecar.unlink(missing_ok=True)
        write_domain(folder, domain.name, [load_domain(domain.name)], tokenizer, cut)
