"""What is computed once for all samples: exact where it can be, refused where it cannot."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import GhostError, WrongSplitError
from ghost_core.testing import GradientHolder, per_sample_gradients

N, T, D = 32, 5, 8
Hold = Callable[..., GradientHolder]
Consumer = Callable[[nn.Module, Tensor, Tensor], Tensor]

CONSUMERS: dict[str, Consumer] = {
    "added": lambda model, x, shared: x + shared,
    "added on the left": lambda model, x, shared: shared + x,
    "added twice": lambda model, x, shared: (x + shared).relu() + shared,
    "multiplied": lambda model, x, shared: x * shared.sigmoid(),
    "scaled, then added": lambda model, x, shared: x + 0.5 * shared,
    "concatenated": lambda model, x, shared: torch.cat([x, shared.expand(len(x), -1, -1)], dim=1),
    "squeezed": lambda model, x, shared: x + shared.squeeze(0),
    "normalised": lambda model, x, shared: x + model.norm(shared),
    "indexed": lambda model, x, shared: x + shared[0],
    "summed": lambda model, x, shared: x + shared.sum(0),
    "averaged": lambda model, x, shared: x + shared.mean(0),
    "dropped out": lambda model, x, shared: x + nn.functional.dropout(shared, 0.5),
    "dropped out in place": lambda model, x, shared: (
        x + nn.functional.dropout(shared, 0.5, inplace=True)
    ),
    "changed in place": lambda model, x, shared: x + shared.mul_(2),
    "multiplied by a matrix": lambda model, x, shared: x + shared @ model.matrix,
    "given to a layer": lambda model, x, shared: x + model.layer(shared),
}


class Model(nn.Module):
    """Has one row of positions for all samples."""

    def __init__(self, consume: Consumer) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(D, D), nn.Embedding(T, D)
        self.layer, self.norm, self.last = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.register_buffer("matrix", torch.randn(D, D))
        self.consume = consume

    def forward(self, x: Tensor) -> Tensor:
        shared = self.positions(torch.arange(T)[None])
        return self.last(self.consume(self, self.embed(x), shared).relu())


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean((1, 2))


@pytest.mark.parametrize("case", CONSUMERS)
def test_gradients_are_exact_or_refused(hold: Hold, case: str) -> None:
    model, x = Model(CONSUMERS[case]).double(), torch.randn(4, T, D, dtype=torch.float64)
    torch.manual_seed(1)
    expected = per_sample_gradients(model, losses(model, x))
    engine = hold(model)
    torch.manual_seed(1)
    try:
        with engine, engine.batch(range(4)) as batch:
            losses(model, x).sum().backward()
    except GhostError:
        return
    got = batch.result.materialize()
    assert got["positions.weight"].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


@pytest.mark.parametrize("case", CONSUMERS)
def test_training_is_identical_or_refused(hold: Hold, case: str) -> None:
    plain, x = Model(CONSUMERS[case]), torch.randn(N, T, D)
    model = copy.deepcopy(plain)
    torch.manual_seed(1)
    expected = losses(plain, x).mean()
    expected.backward()
    drawn = torch.rand(1)
    engine = hold(model)
    torch.manual_seed(1)
    try:
        with engine, engine.batch(range(N)):
            got = losses(model, x).mean()
            got.backward()
    except GhostError:
        return
    assert torch.equal(got, expected)
    assert torch.equal(torch.rand(1), drawn)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize("case", ["added", "added on the left"])
def test_what_is_common_is_handled(hold: Hold, case: str) -> None:
    model, x = Model(CONSUMERS[case]), torch.randn(N, T, D)
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        losses(model, x).sum().backward()
    assert batch.result.materialize()["positions.weight"].shape == (N, T, D)


def test_samples_that_are_computed_one_by_one_are_refused(hold: Hold) -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.layer(row) for row in x.split(1)])

    model, x = OneByOne(), torch.randn(N, D)
    engine = hold(model)
    with engine, pytest.raises(WrongSplitError), engine.batch(range(N)):
        model(x).square().sum().backward()
