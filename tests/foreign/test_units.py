"""Modules that run again as one unit, by hand: exact in every way, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.foreign.foreign import WAYS, Foreign, assert_same, check, curved, outcome, shuffled
from tests.foreign.test_foreign import ALL
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import CaptureError, GhostError, UnknownNameError
from ghost_core.testing import GradientHolder, per_sample_gradients
from ghost_engines import DotProductEngine

N = 3


class Tied(nn.Module):
    """Two layers with one weight, one of them called, the other's weight used in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Around(nn.Module):
    """A block between layers of formulas; what it uses of the layer behind it is tied."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.before, self.block, self.after = nn.Linear(2, 4), block(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.before(x)))


class Functional(nn.Module):
    """Hands the weights of layers inside to functions, and draws noise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        up = functional.linear(x, self.up.weight, self.up.bias).relu()
        return x + functional.dropout(self.down(up * up), 0.3, self.training)


class Outside(nn.Module):
    """A block, the weight of one of whose layers is that of a layer outside of it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block, self.after = nn.Linear(2, 4), Functional(), nn.Linear(4, 6)
        self.after.weight = self.block.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.before(x)))


class Mixing(nn.Module):
    """Adds to each sample the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + y.mean(0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied inside": lambda: Around(Tied),
    "tied outside": Outside,
    "functional": lambda: Around(Functional),
}


def made(model: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return shuffled(model()).double(), torch.randn(N, 5, 2, dtype=torch.float64)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        values: Tensor = curved(model(x))
    return values


def held(model: nn.Module, x: Tensor, *, frozen: bool, **options: Any) -> dict[str, Tensor]:
    engine = GradientHolder(model, **options)
    with engine.frozen() if frozen else engine:
        for _ in range(2):  # the second is not watched
            with engine.batch(range(N)) as batch:
                losses(model, x).sum().backward()
            assert batch.verified
    return batch.result.materialize()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_all_inside_is_exact_without_following(name: str, frozen: bool) -> None:
    model, x = made(MODELS[name])
    expected = per_sample_gradients(model, losses(model, x))
    found = held(model, x, frozen=frozen, units="block", lift=False)
    assert_same(found, expected)


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_scores_and_training(mode: str) -> None:
    model, x = made(MODELS["tied outside"])
    reference = per_sample_gradients(model, losses(model, x))
    directions = {name: torch.randn_like(each) for name, each in model.named_parameters()}
    engine = DotProductEngine(model, mode=mode, units="block")
    engine.add_direction("random", directions)
    with engine:
        for _ in range(2):
            model.zero_grad()
            with engine.batch(range(N)) as batch:
                losses(model, x).sum().backward()
    expected = sum((reference[name] * v).flatten(1).sum(1) for name, v in directions.items())
    torch.testing.assert_close(batch.result.total[:, 0], expected, rtol=1e-9, atol=1e-9)
    for name, each in model.named_parameters():
        torch.testing.assert_close(each.grad, reference[name].sum(0), rtol=1e-9, atol=1e-9)


def test_a_unit_is_run_again_not_followed() -> None:
    model, x = made(MODELS["functional"])
    for units, followed in (("block", False), ((), True)):
        engine = GradientHolder(model, units=units)
        with engine, engine.batch(range(N)):
            losses(model, x).sum().backward()
        assert ("the same for all samples" in engine.coverage()) is followed


def test_without_it_such_a_block_is_refused() -> None:
    model, x = made(MODELS["functional"])
    with pytest.raises(GhostError):
        held(model, x, frozen=False, lift=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_unit_that_mixes_samples_is_refused(frozen: bool) -> None:
    model, x = made(lambda: Around(Mixing))
    with pytest.raises(GhostError, match="cannot be split by sample"):
        held(model, x, frozen=frozen, units="block")


def test_coverage_shows_it_with_its_price() -> None:
    model, _ = made(MODELS["functional"])
    table = GradientHolder(model, units="block").coverage()
    (row,) = [line for line in table.splitlines() if line.startswith("block ") and "pass" in line]
    assert "4" in row.split()
    assert "run again as one" not in GradientHolder(model).coverage()


def test_what_does_not_go_together_is_an_error() -> None:
    model, _ = made(MODELS["functional"])
    with pytest.raises(UnknownNameError, match="blok"):
        GradientHolder(model, units="blok")
    with pytest.raises(CaptureError, match=r"units='block' and generic=False"):
        GradientHolder(model, units="block", generic=False)
    with pytest.raises(CaptureError, match="units must be a glob"):
        GradientHolder(model, units=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [1, -1])
def test_engines_on_one_model_agree_on_units(order: int) -> None:
    model, _ = made(MODELS["functional"])
    engines = [GradientHolder(model, units="block"), GradientHolder(model)][::order]
    with pytest.raises(CaptureError, match="agree on"), engines[0], engines[1]:
        pytest.fail("both are attached")


GLOBS = {
    "torchvision_swin": "plain,shifted",
    "beit": "*",
    "swin_v2": "*",
    "open_clip": "*",
    "torchtune_llama_tied": "*",
    "nanogpt": "*attn*,*mlp*",
    "sparse_embedding": "*",
}
"""Foreign patterns that are exact without units, too."""


@pytest.mark.parametrize("name", GLOBS)
def test_foreign_patterns(name: str) -> None:
    (foreign,) = [each for each in ALL if each.name == name]
    chosen: Foreign = replace(foreign, options={**foreign.options, "units": GLOBS[name]})
    for way in WAYS:
        check(chosen, way)


@pytest.mark.stress
@pytest.mark.parametrize("foreign", ALL, ids=[each.name for each in ALL])
@pytest.mark.parametrize("way", WAYS)
def test_every_pattern_as_a_whole(foreign: Foreign, way: str) -> None:
    """Exact, or refused by name: no pattern is wrong or crashes as one unit."""
    chosen = replace(foreign, options={**foreign.options, "units": "*"})
    assert outcome(chosen, way).partition(":")[0] in {"exact", "refused"}
