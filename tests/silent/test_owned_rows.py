"""Some of the samples of folded rows: any index that tensors take means what it means there."""

from __future__ import annotations

import pytest
import torch
from tests.silent.compare import drawn
from torch import Tensor

from ghost_core import Dense, Owned

N = 4
OWNER = torch.tensor([0, 1, 1, 3, 0, 3, 3])

INDICES: dict[str, slice | Tensor] = {
    "a slice": slice(1, 3),
    "all": slice(None),
    "none": slice(0, 0),
    "a slice with a step": slice(0, 4, 2),
    "a slice from the end": slice(-2, None),
    "positions": torch.tensor([2, 0, 3]),
    "negative positions": torch.tensor([-1, 0]),
    "a mask": torch.tensor([True, False, True, True]),
    "no positions": torch.tensor([], dtype=torch.long),
    "int32 positions": torch.tensor([1, 3], dtype=torch.int32),
}

REPEATED: dict[str, Tensor] = {
    "one twice": torch.tensor([0, 0]),
    "one twice among others": torch.tensor([3, 1, 3, 0]),
    "one from either end": torch.tensor([3, -1]),
}


def owned() -> Owned:
    return Owned(Dense(drawn(len(OWNER), 1, 2, 3)), OWNER, N)


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_narrowed(index: slice | Tensor) -> None:
    gradient = owned()
    assert torch.equal(gradient.narrow(index).materialize(), gradient.materialize()[index])


@pytest.mark.parametrize("index", REPEATED.values(), ids=REPEATED.keys())
def test_repeated(index: Tensor) -> None:
    gradient = owned()
    expected = gradient.materialize()[index]
    narrowed = gradient.narrow(index)
    assert torch.equal(narrowed.materialize(), expected)
    directions = drawn(2, 2, 3)
    assert torch.allclose(narrowed.dot(directions), expected.flatten(1) @ directions.flatten(1).T)
    assert torch.allclose(narrowed.sum(), expected.sum(0))


def test_position_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError):
        owned().narrow(torch.tensor([N]))
