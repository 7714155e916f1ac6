"""Scores of candidates: autograd's numbers, and a training that never notices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost_core import CaptureError, UnbalancedError, WrongSplitError
from ghost_core.state import RandomState
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_core.testing.snapshots import traces
from ghost_engines import CosineEngine, DotProductEngine, InRunValues, NormEngine, ScoringEngine

N, D = 6, 3
IDS = range(10, 10 + N)


class Model(nn.Module):
    """Draws random numbers, writes a buffer, and uses a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(D, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.drop = nn.Dropout(0.4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.first(x))
        return self.last(self.drop(torch.tanh(self.twice(torch.tanh(self.twice(x))))))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2]).square().sum(1)


def engine_of(model: nn.Module, kind: type[ScoringEngine] = DotProductEngine, **options: object):
    """Return an engine with two directions."""
    engine = kind(model, **options)
    seen = torch.linspace(-1, 1, 4 * D, dtype=torch.float64).reshape(4, D)
    engine.add_direction("val", lambda: losses(model, seen).mean())
    engine.add_direction("norm", {name: p.detach().clone() for name, p in model.named_parameters()})
    return engine


def attached(engine: ScoringEngine, way: str) -> AbstractContextManager[object]:
    return {"attached": engine, "frozen": engine.frozen(), "alone": nullcontext()}[way]


def rows(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], 1)


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("way", ["attached", "frozen", "alone"])
def test_dots_and_gram_are_those_of_one_call_of_autograd_for_each_sample(
    model: Model, x: Tensor, way: str, mode: str
) -> None:
    engine = engine_of(model, mode=mode)
    with attached(engine, way):
        for seed in (0, 1):
            torch.manual_seed(seed)
            with engine.paused():  # which thaws what is frozen
                expected = rows(per_sample_gradients(model, losses(model, x)))
            torch.manual_seed(seed)
            with engine.scoring():
                scores = engine.score(lambda: losses(model, x), IDS, gram=True)
            wanted = torch.stack([_flat(engine.direction(name)) for name in ("val", "norm")])
            scale = expected.norm(dim=1)
            assert_within(
                scores.total, expected @ wanted.mT, scale[:, None] * wanted.norm(dim=1), what="dots"
            )
            assert_within(scores.gram, expected @ expected.mT, scale[:, None] * scale, what="Gram")
            assert scores.verified
            assert scores.ids.tolist() == list(IDS)


def _flat(direction: dict[str, Tensor]) -> Tensor:
    return torch.cat([direction[name].flatten() for name in sorted(direction)])


def test_micro_batches_are_candidates_too(model: Model, x: Tensor) -> None:
    model.eval()
    engine = engine_of(model)
    with engine, engine.scoring():
        whole = engine.score(lambda: losses(model, x), IDS, gram=True)
        parts = engine.score(
            lambda: torch.cat([losses(model, part) for part in x.split(2)]), IDS, gram=True
        )
        alone = engine.score(lambda: losses(model, x[:2]), IDS[:2])
    torch.testing.assert_close(parts.total, whole.total)
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(alone.total, whole.total[:2])


def state(model: nn.Module) -> dict[str, object]:
    """Return all that scoring must leave as it is, hooks of ghost's included."""
    return {
        "traces": traces(model),
        "random": RandomState.now(),
        "values": {name: each.clone() for name, each in model.state_dict().items()},
        "gradients": {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()},
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("way", ["attached", "alone"])
def test_nothing_of_the_training_changes(model: Model, x: Tensor, way: str, fails: bool) -> None:
    engine, ran = engine_of(model), []
    model.twice.eval()
    losses(model, x).sum().backward()
    model.first.weight.register_post_accumulate_grad_hook(lambda _: ran.append("accumulated"))

    def scored() -> Tensor:
        model.eval()
        found = losses(model, x) + torch.rand(N, dtype=torch.float64)
        return found[:-1] if fails else found

    with attached(engine, way):
        if way == "attached":
            with engine.batch(IDS):
                losses(model, x).sum().backward()
        ran.clear()
        found = state(model)
        with pytest.raises(CaptureError, match="losses for") if fails else nullcontext():
            score(engine, scored)
        after = state(model)
        assert ran == []
        for key in ("traces", "random", "flags", "modes"):
            assert after[key] == found[key], key
        for key, value in found["values"].items():
            assert torch.equal(after["values"][key], value), key
        for key, (gradient, value) in found["gradients"].items():
            assert after["gradients"][key][0] is gradient, key
            assert torch.equal(after["gradients"][key][1], value), key


def score(engine: ScoringEngine, losses: Callable[[], Tensor], **options: object):
    with engine.scoring():
        return engine.score(losses, IDS, **options)


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_steps_on_the_chosen_are_those_of_plain_training(x: Tensor, mode: str) -> None:
    """With dropout, momentum, accumulated gradients, and values that follow the training."""

    def train(chosen: list[list[int]] | None) -> tuple[list[Tensor], list[list[int]], dict]:
        torch.manual_seed(0)
        model = Model().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        engine, taken = engine_of(model, mode=mode), []
        with engine, InRunValues(engine, optimizer) as values:
            for step in range(4):
                inputs = x + step
                losses(model, inputs[:2]).sum().backward()  # is there already where it is scored
                if chosen is None:
                    scores = score(engine, lambda inputs=inputs: losses(model, inputs), gram=True)
                    found = scores.choose("greedy", k=3, lr=0.05, direction="val")
                    taken.append(found.indices.tolist())
                    assert found.ids.tolist() == [10 + at for at in taken[-1]]
                subset = inputs[(chosen or taken)[step]]
                with engine.batch(range(3)):
                    losses(model, subset).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return list(model.state_dict().values()), taken, values.to_dict("val")

    ended, taken, values = train(None)
    again, _, expected = train(taken)
    assert len({tuple(each) for each in taken}) > 1
    assert all(map(torch.equal, ended, again))
    assert values == expected


def test_a_split_verified_before_the_step_is_not_taken_for_one_that_was_trained_with(
    model: Model, x: Tensor
) -> None:
    """Nothing tells while parameters are frozen that a part of the gradient goes elsewhere."""
    engine, penalty = engine_of(model), model.first.weight.square().sum()
    with engine:
        assert score(engine, lambda: losses(model, x)).verified
        with pytest.raises(UnbalancedError, match=r"first\.weight"), engine.batch(IDS):
            (losses(model, x).sum() + penalty).backward()


def test_a_direction_ages_by_blocks_as_by_batches(model: Model, x: Tensor) -> None:
    made: list[int] = []
    engine = DotProductEngine(model)
    engine.add_direction("val", lambda: [losses(model, x).sum(), made.append(1)][0], refresh=2)
    with engine:
        for expected in (1, 1, 2):
            with engine.scoring():
                for _ in range(2):
                    engine.score(lambda: losses(model, x), IDS)
            assert len(made) == expected


class Scaler:
    def get_scale(self) -> float:
        return 1024.0


def test_the_scale_of_a_scaler_is_no_part_of_the_scores(model: Model, x: Tensor) -> None:
    model.eval()
    plain, scaled = engine_of(model), engine_of(model, grad_scaler=Scaler())
    found = [score(each, lambda: losses(model, x), gram=True) for each in (plain, scaled)]
    torch.testing.assert_close(found[0].total, found[1].total)
    torch.testing.assert_close(found[0].gram, found[1].gram)


def test_any_engine_with_directions_scores(model: Model, x: Tensor) -> None:
    model.eval()
    expected = score(engine_of(model), lambda: losses(model, x))
    found = score(engine_of(model, CosineEngine), lambda: losses(model, x))
    assert torch.equal(found.total, expected.total)
    some = score(engine_of(model, layers="last"), lambda: losses(model, x))
    assert some.by_parameter.keys() == {"last.weight", "last.bias"}
    torch.testing.assert_close(some.total[:, 0], expected.by_layer["last"][:, 0])


# Refusals


def test_a_split_that_is_wrong_is_refused_before_the_step(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    engine = DotProductEngine(model)
    engine.add_direction("val", lambda: losses(model, x).sum())
    with engine, pytest.raises(WrongSplitError, match="cannot be split by sample"):
        score(engine, lambda: losses(model, x))


def test_a_parameter_that_was_frozen_meanwhile_is_named(model: Model, x: Tensor) -> None:
    engine = engine_of(model)
    with engine:
        score(engine, lambda: losses(model, x))
        model.last.bias.requires_grad_(False)
        with pytest.raises(CaptureError, match=r"last\.bias no longer requires gradients"):
            score(engine, lambda: losses(model, x))


def test_scoring_at_the_wrong_time_is_refused(model: Model, x: Tensor) -> None:
    engine, other = engine_of(model), NormEngine(model, loss_weights="sum")
    with pytest.raises(CaptureError, match=r"inside of with engine\.scoring"):
        engine.score(lambda: losses(model, x), IDS)
    with other, pytest.raises(CaptureError, match="attach the engine first"):
        score(engine, lambda: losses(model, x))
    with pytest.raises(CaptureError, match="call add_direction first"):
        score(DotProductEngine(model), lambda: losses(model, x))
    with pytest.raises(CaptureError, match="its direction comes with each batch"):
        score(DotProductEngine(model, mode="concatenated"), lambda: losses(model, x))
    with engine:
        with engine.paused(), pytest.raises(CaptureError, match="while the model is left alone"):
            score(engine, lambda: losses(model, x))
        with engine.scoring(), pytest.raises(CaptureError, match="there are no candidates"):
            engine.score(lambda: losses(model, x[:0]), [])
        with engine.batch(IDS):
            with pytest.raises(CaptureError, match="a batch is open already"):
                score(engine, lambda: losses(model, x))
            losses(model, x).sum().backward()
        with engine.scoring():
            with pytest.raises(CaptureError, match="scoring"), engine.batch(IDS):
                pass
            with pytest.raises(CaptureError, match="cannot attach an engine"), other:
                pass
            with pytest.raises(CaptureError, match="a batch is open already"):
                score(engine, lambda: losses(model, x))
        with engine.batch(IDS) as batch:
            losses(model, x).sum().backward()
    assert batch.result.verified


@pytest.mark.parametrize("bad", ["count", "mean", "nan", "elsewhere", "tensor"])
def test_losses_that_are_not_one_for_each_candidate_are_refused(
    model: Model, x: Tensor, bad: str
) -> None:
    known = losses(model, x)
    given: dict[str, Any] = {
        "tensor": known,
        "count": lambda: losses(model, x)[:-1],
        "mean": lambda: losses(model, x).mean(),
        "nan": lambda: losses(model, x) * float("nan"),
        "elsewhere": lambda: known,
    }
    with pytest.raises(CaptureError, match=r"loss|not called"):
        score(engine_of(model), given[bad])


def test_leaving_the_engine_inside_leaves_the_model_as_it_was(model: Model, x: Tensor) -> None:
    engine, found = engine_of(model), traces(model)
    engine.__enter__()
    with engine.scoring():
        engine.score(lambda: losses(model, x), IDS)
        engine.__exit__(None, None, None)
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert traces(model) == found
    with engine, engine.batch(IDS) as batch:
        losses(model, x).sum().backward()
    assert batch.result.verified
