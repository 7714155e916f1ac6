"""A module that is given samples and returns what belongs to none of them: a slice of a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.foreign.foreign import assert_same, next_token_loss, shuffled, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


class Checkpointed(nn.Module):
    """Positions are added inside of a checkpoint, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 6)
        self.positions, self.inside = Positions(False), True

    def add(self, x: Tensor) -> Tensor:
        return (x + self.positions(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        added = checkpoint(self.add, x, use_reentrant=False) if self.inside else self.add(x)
        return self.after(added)


def test_what_was_proven_where_it_was_followed_does_not_hold_for_the_call() -> None:
    """A checkpoint has the module run as a call from then on, and T = N as if it had rows."""
    torch.manual_seed(0)
    model = shuffled(Checkpointed()).double()
    engine = GradientHolder(model)

    def backward(n: int) -> None:
        model(torch.randn(n, LENGTH, 6).double()).square().sum().backward()

    with engine.frozen():
        with engine.batch(range(1)):
            backward(1)
        model.inside = False
        with engine.batch(range(3)):
            backward(3)
        with pytest.raises(WrongSplitError, match="sample 0"), engine.batch(range(LENGTH)):
            backward(LENGTH)


class OneRow(Positions):
    """The same with an axis of one for the samples."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[None]


@pytest.mark.parametrize("frozen", [False, True])
def test_one_row_may_be_used_otherwise_in_a_later_batch(frozen: bool) -> None:
    """It is as the module returned it, and not expanded to a row of each sample."""
    torch.manual_seed(0)
    other = []

    def meet(x: Tensor, at: Tensor) -> Tensor:
        return x + at + (at.sum() * len(at) if other else 0)

    model = shuffled(Model(False, meet)).double()
    model.positions = OneRow(False).double()
    engine = GradientHolder(model)
    batches = []
    for n in (3, 1, 3, LENGTH):
        other += [True] * (len(batches) == 2)
        ids = tokens(n, LENGTH)
        logits = model(ids)
        expected = per_sample_gradients(model, next_token_loss(logits, ids))
        batches.append((ids, logits.detach(), expected))
    other.clear()
    with engine.frozen() if frozen else engine:
        for at, (ids, logits, reference) in enumerate(batches):
            other += [True] * (at == 2)
            with engine.batch(range(len(ids))) as batch:
                found = model(ids)
                next_token_loss(found, ids).sum().backward()
            assert torch.equal(found.detach(), logits)
            assert_same(batch.result.materialize(), reference)


@pytest.mark.parametrize("use", [torch.sum, lambda row: row.detach().sum()])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_row_that_is_expanded_is_watched_in_later_batches_too(
    use: Callable[[Tensor], Tensor], frozen: bool
) -> None:
    """In a checkpoint nothing is followed, and its sum would be that of all samples' rows."""
    torch.manual_seed(0)
    model = shuffled(Checkpointed()).double()
    model.positions = OneRow(False).double()
    engine = GradientHolder(model)

    def backward() -> None:
        model(torch.randn(3, LENGTH, 6).double()).square().sum().backward()

    def add(x: Tensor) -> Tensor:
        row = model.positions(x)
        return x + row + use(row)

    with engine.frozen() if frozen else engine:
        with engine.batch(range(3)):
            backward()
        model.add = add
        with pytest.raises(WrongSplitError, match="positions"), engine.batch(range(3)):
            backward()
