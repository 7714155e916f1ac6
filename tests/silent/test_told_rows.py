"""Rows whose samples were told, and parameters that meet other rows than these.

Each of eight images belongs to a sample, which `row_owner` tells. A parameter that is used outside
of its module may meet packed tokens of images: as many of each image in the first batch, so that
whose they are looks like what was told, and in later batches not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.foreign.foreign import assert_same, curved
from tests.silent.compare import WAYS, Counted, drawn
from torch import Tensor, nn

from ghost_core.testing import GradientHolder, per_sample_gradients

N, M, T, D = 4, 8, 6, 5  # samples, images, tokens, inputs
OWNER = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3])
FULL, EVEN, UNEVEN = [T] * M, [6, 2] * 4, [5, 4, 6, 6, 3, 2, 1, 5]
LATER: list[Sequence[int]] = [EVEN, [2, 6] * 4, FULL, UNEVEN, [1, 1, 2, 2, 3, 3, 6, 6]]

Used = Callable[["Images", Tensor], Tensor]
"""From packed tokens `[R, D]` to as many."""


class Images(nn.Module):
    """A layer on all tokens, and something else on packed ones, added up by sample."""

    def __init__(self, used: Used) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale, self.used = nn.Linear(D, D), nn.Parameter(torch.rand(D)), used
        self.double()

    def forward(self, x: Tensor, lengths: Tensor, *, owner: Tensor) -> Tensor:
        mask = torch.arange(T) < lengths[:, None]
        tokens = self.used(self, Counted.apply(self.first(x))[mask]).tanh()
        padded = x.new_zeros(M, T, D).masked_scatter(mask[..., None], tokens)
        return x.new_zeros(N, D).index_add(0, owner, padded.square().sum(1))


def scaled(model: Images, tokens: Tensor) -> Tensor:
    return tokens * model.scale


def tied(model: Images, tokens: Tensor) -> Tensor:
    return nn.functional.linear(tokens, model.first.weight)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", [FULL, UNEVEN])
@pytest.mark.parametrize("used", [scaled, tied])
def test_exact_in_every_batch(used: Used, first: Sequence[int], way: str) -> None:
    model, plain = Images(used), Images(used)
    engine = GradientHolder(model, row_owner={"*": "owner"})
    with engine.frozen() if way == "frozen" else engine:
        for lengths in (first, *LATER):
            given = drawn(M, T, D), torch.tensor(lengths)
            expected = per_sample_gradients(plain, curved(plain(*given, owner=OWNER)))
            with engine.batch(range(N)) as batch:
                curved(model(*given, owner=OWNER)).sum().backward()
            model.zero_grad()
            assert batch.verified
            assert_same(batch.result.materialize(), expected)


def test_rows_that_were_all_told_are_not_asked_for() -> None:
    """How many tokens each image has tells nothing that is not known."""
    engine, probes = GradientHolder(Images(lambda _, tokens: tokens), row_owner={"*": "owner"}), []
    with engine:
        for lengths in (UNEVEN, *LATER):
            given = drawn(M, T, D), torch.tensor(lengths)
            Counted.runs = 0
            with engine.batch(range(N)):
                curved(engine.model(*given, owner=OWNER)).sum().backward()
            probes.append(Counted.runs - 1)
    assert probes[0] > 0
    assert not any(probes[1:])
