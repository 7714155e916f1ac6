"""A model compiled after attaching runs as it does without compiling, and ghost says so."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from tests.silent.compare import WAYS, drawn, squares
from torch import Tensor, fx, nn

from ghost_core import CaptureError
from ghost_core.testing import GradientHolder, per_sample_gradients

N = 4


def test_compiled_after_attaching_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Scores are exact either way; what is lost is said once, or is not lost."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double(), drawn(N, 3)
    expected = per_sample_gradients(model, squares(model(x)))
    engine = GradientHolder(model)
    with engine, caplog.at_level(logging.WARNING):
        compiled = torch.compile(model, backend=Counting())
        for _ in range(2):
            with engine.batch(range(N)) as batch:
                squares(compiled(x)).sum().backward()
    for name, held in batch.result.materialize().items():
        assert torch.allclose(held, expected[name], rtol=1e-9, atol=1e-12)
    said = [each for each in caplog.records if each.name.startswith("ghost")]
    assert len(said) == 1
    assert "uncompiled" in said[0].getMessage()


class Counting:
    """A backend that counts how often what it compiled runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        def run(*args: Tensor) -> object:
            self.runs += 1
            return graph(*args)

        return run


class Blocks(nn.Module):
    """A compiled block that is not tracked, between layers that are, with positions or without."""

    def __init__(self, backend: Counting, positions: bool = False) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 3), nn.Linear(5, 2)
        self.positions = nn.Embedding(3, 3) if positions else None
        self.block = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.compiled = torch.compile(self.block, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.positions is not None:
            x = x + self.positions(torch.arange(3))
        return self.head(self.compiled(x).sum(1))


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_block_that_is_not_tracked(
    way: str, positions: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs compiled but where values are followed: in the first batch, and behind positions."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend = Counting()
    model, x = Blocks(backend, positions).double(), drawn(N, 3, 3)
    expected = per_sample_gradients(model, squares(model(x)))
    engine = GradientHolder(model, exclude=["block.*", "compiled.*"])
    with engine.frozen() if way == "frozen" else engine:
        for _ in range(3):
            before = backend.runs
            with engine.batch(range(N)) as batch:
                squares(model(x)).sum().backward()
            held = batch.result.materialize()
            assert held
            for name, gradient in held.items():
                assert torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-12)
    assert (backend.runs > before) is not positions
    assert not [each for each in caplog.records if each.name.startswith("ghost")]


def test_compiled_block_that_is_tracked_is_refused() -> None:
    with pytest.raises(CaptureError, match="compiled"):
        GradientHolder(Blocks(Counting()))


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_scores_from_an_eager_pass_every_few_steps() -> None:
    """Whole compiled training, with an engine that is attached for the passes with scores only."""
    every, steps, x = 3, 9, drawn(N, 3)

    def trained(with_scores: bool) -> tuple[dict[str, Tensor], int, int]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        backend, scored = Counting(), 0
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        compiled = torch.compile(model, backend=backend)
        engine = GradientHolder(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            if step % every:
                squares(compiled(x)).sum().backward()
            elif with_scores:
                expected = per_sample_gradients(model, squares(model(x)))
                with engine, engine.batch(range(N)) as batch:
                    squares(model(x)).sum().backward()
                for name, held in batch.result.materialize().items():
                    assert torch.allclose(held, expected[name], rtol=1e-9, atol=1e-12)
                scored += 1
            else:
                squares(model(x)).sum().backward()
            optimizer.step()
        return model.state_dict(), backend.runs, scored

    plain, plain_runs, _ = trained(with_scores=False)
    found, runs, scored = trained(with_scores=True)
    assert scored == 3
    assert runs == plain_runs == steps - scored
    assert all(torch.equal(found[name], plain[name]) for name in plain)
