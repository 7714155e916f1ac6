"""Several domains of tokens as one data set."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor
from torch.utils.data import Dataset

from ghost_core import UnknownNameError
from ghost_engines.corpus.errors import CorpusError, position
from ghost_engines.corpus.memmap import TokenBlock, TokenMemmap
from ghost_engines.corpus.sidecar import missing, named, token_path


class TokenCorpus(Dataset[TokenBlock]):
    """The blocks of several domains, one after another.

    Positions depend on which domains are read; ids do not: see `TokenMemmap`.

    Args:
        domains: The files of each domain, by its name.

    Attributes:
        domains: The same.
        vocabulary: Number of token ids.
        length: Tokens of a block.
        tokenizer: Where the tokenizer is; may be empty.

    Raises:
        CorpusError: If there is none, if the vocabulary, the length of blocks or the tokenizer is
            not the same in all, or if two domains share ids.
    """

    def __init__(self, domains: Mapping[str, TokenMemmap]) -> None:
        if not domains:
            raise CorpusError("a corpus must have at least one domain")
        self.domains = dict(domains)
        for name in ("vocabulary", "length", "tokenizer"):
            found = {domain: getattr(each.format, name) for domain, each in self.domains.items()}
            if len(set(found.values())) != 1:
                raise CorpusError(f"domains of a corpus must have one {name}, not {found}")
        formats = [each.format for each in self.domains.values()]
        self.vocabulary = formats[0].vocabulary
        self.length = formats[0].length
        self.tokenizer = formats[0].tokenizer
        self._ends = list(itertools.accumulate(map(len, self.domains.values())))
        self._check_ids()

    @classmethod
    def open(
        cls, folder: str | Path, split: str = "train", domains: Sequence[str] | None = None
    ) -> Self:
        """Open domains of a folder.

        Args:
            folder: Has pairs of files, `{split}-{domain}.bin` and `{split}-{domain}.json`.
            split: Which part: `train`, `val`.
            domains: Names of domains, in the order that is wanted; all, by name, if None.

        Raises:
            UnknownNameError: If a domain is not there.
            CorpusError: If there is none, or files are malformed or do not go together.
        """
        files = named(Path(folder))
        there = {domain: path for (part, domain), path in files.items() if part == split}
        if not there:
            raise missing(token_path(folder, split, "DOMAIN"), Path(folder))
        for domain in domains or ():
            if domain not in there:
                raise UnknownNameError("domain", domain, there, f"They are in {folder}, {split}.")
        wanted = there if domains is None else domains
        return cls({name: TokenMemmap(there[name]) for name in wanted})

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        """Say what it holds."""
        parts = ", ".join(f"{name} {len(each)}" for name, each in self.domains.items())
        return f"<TokenCorpus: {len(self)} blocks of {self.length} tokens: {parts}>"

    def __getitem__(self, index: int) -> TokenBlock:
        """Return a block.

        Raises:
            IndexError: If there is none with that number.
            CorpusError: If a token id is outside the vocabulary.
        """
        number = position(index, len(self), f"the corpus has {len(self)} blocks", backwards=True)
        at = bisect.bisect_right(self._ends, number)
        domain = list(self.domains.values())[at]
        return domain[number - (self._ends[at] - len(domain))]

    def domain_of(self, sample: int) -> str:
        """Return the name of the domain that a sample belongs to, by its id.

        Raises:
            IndexError: If there is no such sample.
        """
        for name, each in self.domains.items():
            if sample in each.ids:
                return name
        raise IndexError(f"there is no sample {sample} in {', '.join(self.domains)}")

    def by_id(self, sample: int) -> Tensor:
        """Return the tokens of the sample with an id, int64 `[T]`.

        Raises:
            IndexError: If there is no such sample.
        """
        return self.domains[self.domain_of(sample)].by_id(sample)

    def _check_ids(self) -> None:
        ranges = sorted(
            (each.ids.start, each.ids.stop, name) for name, each in self.domains.items()
        )
        for (_, end, one), (start, _, other) in itertools.pairwise(ranges):
            if start < end:
                raise CorpusError(
                    f"domains {one!r} and {other!r} share the ids from {start}",
                    reason="a value of a sample would be that of two",
                    remedy="write them with different first_id: see domain_number",
                )
