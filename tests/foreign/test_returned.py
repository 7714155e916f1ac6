"""A module that is given samples and returns what belongs to none of them: a slice of a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.foreign.foreign import assert_same, next_token_loss, shuffled, tokens
from torch import Tensor, nn

from ghost_core import WrongSplitError
from ghost_core.testing import GradientHolder, per_sample_gradients

LENGTH = 4


class Positions(nn.Embedding):
    """A slice of the weight, or rows of it by position, whatever the ids are."""

    def __init__(self, by_index: bool) -> None:
        super().__init__(LENGTH + 1, 6)
        self.by_index = by_index

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return self.weight[torch.arange(length)] if self.by_index else self.weight[1 : length + 1]


class Model(nn.Module):
    """Ids and positions, which meet in a function."""

    def __init__(self, by_index: bool, meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.token, self.positions = nn.Embedding(11, 6), Positions(by_index)
        self.meet, self.head = meet, nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.meet(self.token(ids), self.positions(ids)).tanh())


MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda x, at: x + at,
    "twice": lambda x, at: x * at.exp() + at,
    "expanded": lambda x, at: x - at.expand(len(x), -1, -1),
    "without a closed form": lambda x, at: torch.maximum(x, at.sin()),
    "from its parts": lambda x, at: x + at[:1] * at.mean(),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("n", "by_index"), [(3, False), (3, True), (LENGTH, False)])
@pytest.mark.parametrize("meeting", MEETINGS)
def test_it_is_followed_from_there_on(meeting: str, n: int, by_index: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    model = shuffled(Model(by_index, MEETINGS[meeting])).double()
    batches = [tokens(n, LENGTH) for _ in range(2)]  # the second is not watched
    expected = [per_sample_gradients(model, next_token_loss(model(ids), ids)) for ids in batches]
    engine = GradientHolder(model)
    with engine.frozen() if frozen else engine:
        for ids, reference in zip(batches, expected, strict=True):
            with engine.batch(range(n)) as batch:
                next_token_loss(model(ids), ids).sum().backward()
            assert batch.verified
            assert_same(batch.result.materialize(), reference)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_proven_where_it_was_followed_does_not_hold_for_the_call(frozen: bool) -> None:
    """A batch of one token leaves open whether its one row is of a sample."""
    torch.manual_seed(0)
    engine = GradientHolder(shuffled(Model(False, MEETINGS["added"])).double())

    def backward(n: int) -> None:
        ids = torch.randint(11, (n, n))
        engine.model(ids).square().sum().backward()

    with engine.frozen() if frozen else engine:
        for n in (3, 1):
            with engine.batch(range(n)):
                backward(n)
        with pytest.raises(WrongSplitError, match="sample 0"), engine.batch(range(3)):
            backward(3)
