"""Strings of which a store has few, one for each row: a domain, a source, a label."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


class Names(Sequence[str]):
    """A table of names that only grows: a name keeps its number."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._numbers: dict[str, int] = {}
        self._listed: list[str] = []
        self.numbers(names)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> str:  # type: ignore[override] # names are not sliced
        if len(self._listed) < len(self._numbers):
            self._listed = list(self._numbers)  # as numbers are given in order
        return self._listed[number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def numbers(self, names: Iterable[str]) -> Tensor:
        """Return the numbers of names, int32 `[N]`; new ones are added."""
        known = self._numbers
        found = [known.setdefault(name, len(known)) for name in names]
        return torch.tensor(found, dtype=torch.int32)


@dataclass(frozen=True, eq=False, repr=False)
class Labels(Sequence[str]):
    """A name for each row, as a number and a table.

    Attributes:
        codes: Numbers of the names, int32 `[N]`.
        names: The names by their numbers.
    """

    codes: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        """Return the number of rows N."""
        return len(self.codes)

    def __getitem__(self, at: int) -> str:  # type: ignore[override] # rows are not sliced
        """Return the name of a row."""
        return self.names[int(self.codes[at])]

    def __iter__(self) -> Iterator[str]:
        return (self.names[code] for code in self.codes.tolist())

    def __repr__(self) -> str:
        """Say how many rows and names there are."""
        return f"{type(self).__name__}(N={len(self)}, {len(self.names)} names)"

    def equal(self, name: str) -> Tensor:
        """Return which rows have a name, bool `[N]`."""
        names = list(self.names)
        return self.codes == (names.index(name) if name in names else -1)

    def numbered(self, names: Names) -> Tensor:
        """Return the numbers that the rows' names have in another table, int32 `[N]`."""
        return names.numbers(self.names)[self.codes.long()]

    def compact(self) -> Self:
        """Return them with those names alone that occur, in order of the first row with each."""
        used, first, codes = np.unique(self.codes.numpy(), return_index=True, return_inverse=True)
        order = first.argsort()
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        names = list(self.names)
        kept = tuple(names[code] for code in used[order].tolist())
        return type(self)(torch.from_numpy(rank[codes].astype(np.int32)), kept)


def encode_names(names: Sequence[str]) -> Tensor:
    """Return a table of names as a shard holds it: JSON, uint8 `[bytes]`."""
    text = json.dumps(list(names), separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode_names(data: Tensor, codes: Tensor) -> tuple[str, ...]:
    """Return the table of names of a shard.

    Raises:
        ValueError: If it is none, or too short for the numbers of the rows.
    """
    try:
        names = json.loads(data.numpy().tobytes())
    except RecursionError as error:
        raise ValueError("its table of names is nested too deeply") from error
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise ValueError("its table of names holds something else")
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < len(names):
        raise ValueError(f"its table of {len(names)} names does not fit its rows")
    return tuple(names)
