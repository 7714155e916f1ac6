"""Modules that are declared to be called on nothing of the samples, and what was followed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import CaptureError, WrongSplitError
from ghost_core.testing import GradientHolder, per_sample_gradients

N, T, D = 4, 4, 5
Hold = Callable[..., GradientHolder]


class Model(nn.Module):
    """Positions come in as an input, with as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(7, D), nn.Embedding(T, D)
        self.gate, self.head = nn.Linear(D, D), nn.Linear(D, 7)
        self.double()

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        places = self.wpe(positions)
        x = self.wte(ids) + places
        return self.head(x * self.gate(places).sigmoid())


class Wrong(Model):
    """The gate is called on what belongs to samples, and on what was computed."""

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(positions)
        return self.head(x * self.gate(x).sigmoid())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(7, (N, T)), torch.arange(T)


def losses(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return model(*given).sin().mean((1, 2))


DECLARED = {"batch_dim": {"wpe": None}}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_module_that_is_declared(hold: Hold, assert_held, frozen: bool) -> None:
    """Only the user knows that positions are none of the samples': sizes say they could be."""
    model = Model()
    engine, batches = hold(model, **DECLARED), [batch() for _ in range(2)]
    expected = [per_sample_gradients(model, losses(model, given)) for given in batches]
    with engine.frozen() if frozen else engine:
        for given, gradients in zip(batches, expected, strict=True):
            with engine.batch(range(N)) as scored:
                losses(model, given).sum().backward()
            assert scored.verified
            assert_held(scored.result, gradients)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_wrong_declaration_is_exact_or_refused(hold: Hold, assert_held, frozen: bool) -> None:
    model, given = Wrong(), batch()
    expected = per_sample_gradients(model, losses(model, given))
    engine = hold(model, batch_dim={"wpe": None, "gate": None})
    if frozen:
        refused = pytest.raises(WrongSplitError, match=r"gate .* declared to be called")
        with engine.frozen(), refused, engine.batch(range(N)):
            losses(model, given).sum().backward()
        return
    with engine, engine.batch(range(N)) as scored:
        losses(model, given).sum().backward()
    assert_held(scored.result, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_dim": {"": None}},
        {"batch_dim": {"*": None}},
        {**DECLARED, "lift": False},
        {**DECLARED, "row_owner": {"wpe": "owner"}},
    ],
)
def test_declarations_that_contradict_others(hold: Hold, options: dict[str, object]) -> None:
    with pytest.raises(CaptureError, match=r"contradict each other|batch_dim of the model itself"):
        hold(Model(), **options)


def test_coverage_shows_what_was_followed_and_at_what_cost(hold: Hold) -> None:
    model = Model()
    engine = hold(model, **DECLARED)
    before = engine.coverage()
    assert "the same for all samples" not in before
    with engine, engine.batch(range(N)):
        losses(model, batch()).sum().backward()
    after = engine.coverage()
    assert after.startswith(before)
    table = [line.split("  ") for line in after.removeprefix(before).strip().splitlines()]
    rows = [[cell.strip() for cell in line if cell] for line in table]
    product = "one backward pass of the operation per sample"
    assert rows == [
        ["the same for all samples", "meets them in", "at the cost of"],
        ["gate.bias", "mul", product],
        ["gate.weight", "mul", product],
        ["wpe.weight", "add", "closed form"],
        ["wpe.weight", "mul", product],
    ]
