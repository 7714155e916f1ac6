"""Gradients of rows that samples own in groups, against gradients that are added up by hand."""

import pytest
import torch
from torch import Size, Tensor

from ghost_core import Dense, Lookups, Outer, PerSampleGradient, Tokens
from ghost_core.algebra import Owned
from ghost_core.split import Fold
from ghost_core.testing import Gradients, assert_within, check_operations

N, K = 3, 2


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def linear(rows: int) -> PerSampleGradient:
    return Outer(Tokens(random(rows, 4, 1, 5)), random(rows, 4, 1, 6), Size((6, 5)))


def table(rows: int) -> PerSampleGradient:
    index = torch.randint(0, 5, (rows, 4))
    return Outer(Lookups(index, 5), random(rows, 4, 1, 3), Size((5, 3)))


def bias(rows: int) -> PerSampleGradient:
    return Dense(random(rows, 4, 6))


OWNERS = {
    "sample-major": Fold.SAMPLE_MAJOR.owners(N, N * K),
    "sample-minor": Fold.SAMPLE_MINOR.owners(N, N * K),
    "unequal": torch.tensor([2, 0, 2, 2, 0]),  # sample 1 owns nothing
    "one each, out of order": torch.tensor([1, 2, 0]),
    "no rows": torch.tensor([], dtype=torch.int64),
}


def added(rows: PerSampleGradient, owner: Tensor) -> Tensor:
    total = torch.zeros(N, *rows.shape, dtype=torch.float64)
    for row, sample in enumerate(owner.tolist()):
        total[sample] += rows.materialize()[row]
    return total


@pytest.mark.parametrize("make", [linear, table, bias])
@pytest.mark.parametrize("case", OWNERS)
def test_every_operation_adds_the_rows_of_a_sample(case, make) -> None:
    owner = OWNERS[case]
    rows, plain = make(len(owner)), make(N)
    owned = Owned(rows, owner, N)
    assert (owned.n, owned.shape) == (N, rows.shape)
    scale = torch.full((N,), 10.0, dtype=torch.float64)
    gradients = Gradients([owned], added(rows, owner), scale)
    check_operations(gradients, gradients)
    check_operations(gradients, Gradients([plain], plain.materialize(), scale))
    both = Gradients([owned, plain], gradients.expected + plain.materialize(), scale)
    check_operations(both, gradients)


def test_rows_are_built_in_parts(monkeypatch) -> None:
    owner = OWNERS["unequal"]
    rows = linear(len(owner))
    expected = added(rows, owner)
    monkeypatch.setattr(
        "ghost_core.algebra.owned.chunks", lambda n, size: [slice(0, 2), slice(2, n)]
    )
    assert_within(Owned(rows, owner, N).materialize(), expected, 10.0)


def test_rows_are_further_tokens_where_samples_own_as_many() -> None:
    for fold in Fold:
        owner = fold.owners(N, N * K)
        rows = linear(N * K)
        dots = Owned(rows, owner, N).token_dot(direction := random(1, 6, 5))
        assert dots.shape == (N, K * 4, 1)
        by_row = rows.token_dot(direction)
        for sample in range(N):
            mine = by_row[owner == sample].reshape(K * 4, 1)
            assert torch.equal(dots[sample], mine)
    assert Owned(linear(5), OWNERS["unequal"], N).token_dot(direction).shape == (N, 1, 1)


def test_some_samples_by_position() -> None:
    owner = OWNERS["unequal"]
    rows = linear(len(owner))
    chosen = torch.tensor([2, 0])
    narrowed = Owned(rows, owner, N).narrow(chosen)
    assert narrowed.n == 2
    assert_within(narrowed.materialize(), added(rows, owner)[chosen], 10.0)
