"""Domains of samples as one data set, whose ids tell them apart."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ghost_engines.corpus.errors import CorpusError, position
from ghost_engines.corpus.sidecar import BLOCKS_PER_DOMAIN


class Mixture(Dataset[dict[str, Any]]):
    """The samples of several domains, one after another.

    Sample i of domain k has the id `k · 10⁹ + i`, as in a corpus of tokens.

    Args:
        domains: The data set of each domain by its name, in order: samples are mappings.

    Raises:
        CorpusError: If there is none.
    """

    def __init__(self, domains: Mapping[str, Any]) -> None:
        if not domains:
            raise CorpusError("a corpus must have at least one domain")
        self.domains = dict(domains)
        self._names = list(self.domains)
        self._ends = list(itertools.accumulate(map(len, self.domains.values())))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample with its id.

        Raises:
            IndexError: If there is none with that number.
        """
        number = position(index, len(self), f"there are {len(self)} samples")
        domain = bisect.bisect_right(self._ends, number)
        data = self.domains[self._names[domain]]
        at = number - (self._ends[domain] - len(data))
        return {**data[at], "sample_id": domain * BLOCKS_PER_DOMAIN + at}

    def groups(self, ids: Tensor) -> list[str]:
        """Return the name of the domain of each sample, by their ids, int64 `[n]`."""
        return [self._names[number // BLOCKS_PER_DOMAIN] for number in ids.tolist()]

    def text(self, sample: int) -> str:
        """Return a sample as a text for people, by its id.

        Raises:
            IndexError: If there is none with that id.
        """
        domain, at = divmod(sample, BLOCKS_PER_DOMAIN)
        if not 0 <= domain < len(self._names):
            raise IndexError(f"there are {len(self._names)} domains, and no sample {sample}")
        found: str = self.domains[self._names[domain]].text(at)
        return found
