"""Directions that are kept as factors: their dots are those of the direction itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_kit import gradient, squares
from mode_kit import EXACT, TIED, Gradients, check_grads, check_norms_of, reference
from torch import Tensor, nn

import ghost_engines.dot_product
from ghost_core import CaptureError, UnknownNameError
from ghost_core.testing import (
    LayerExample,
    TinyTransformer,
    dense,
    losses,
    next_token_losses,
    per_sample_gradients,
)
from ghost_engines import (
    CosineEngine,
    DotProductEngine,
    FactoredDirection,
    InRunValues,
    load_direction,
    save_direction,
    unit_norm,
)
from ghost_engines.directions.direction import direction_of

CheckScores = Callable[..., None]


def factored(engine: Any, name: str = "val") -> tuple[set[str], set[str]]:
    """Return the parameters that a direction has factors for, and those it was built for."""
    direction = engine._directions[name]
    return set(direction.uses), set(direction.tensors)


# Over the table of layers

NAMES = [name for name in EXACT if name != "scale, private generator"]  # draws anew in each call
QUICK = {*NAMES[::53], *TIED}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(
            name, mode, marks=() if name in QUICK and mode == "exact" else pytest.mark.stress
        )
        for name in NAMES
        for mode in ("exact", "fused")
    ],
)
def test_every_layer(name: str, mode: str, assert_scores: CheckScores) -> None:
    """Dots, norms and cosines, with factors wherever there are some, and where they are cheaper."""
    example = EXACT[name]
    gradients, others = reference(example), validation_gradients(example)
    plain, model = example.build(), example.build()
    losses(example, plain, example.draw()).sum().backward()
    engine = DotProductEngine(model, mode=mode, norms=True, **example.options)
    directions: dict[str, Gradients] = {}
    for keep in ("factors", "cheaper", "built"):
        direction = FactoredDirection(
            partial(validation_loss, example, model), samples=example.n, keep=keep
        )
        engine.add_direction(keep, direction, training=True)
        directions[keep] = others
    with engine, engine.batch(range(example.n)) as batch:
        losses(example, model, example.draw()).sum().backward()
    assert_scores(batch.result, gradients, directions)
    check_norms_of(batch.result, gradients, directions)
    check_grads(plain, model, 0.0 if mode == "exact" else 1e-9)


def validation_loss(example: LayerExample, model: nn.Module) -> Tensor:
    """Return the loss of other samples than those of the batch."""
    return losses(example, model, example.draw(seed=5)).sum()


def validation_gradients(example: LayerExample) -> dict[str, Tensor]:
    """Return its gradient by per-sample autograd; that of a scalar is `[1]`."""
    model = dense(example.build())
    own = per_sample_gradients(model, losses(example, model, example.draw(seed=5)))
    return {name: each.sum(0).reshape(each.shape[1:] or (1,)) for name, each in own.items()}


# As training goes


@pytest.fixture
def others() -> Tensor:
    """Validation samples for `transformer`."""
    return torch.randint(0, 19, (2, 6), generator=torch.Generator().manual_seed(2))


def test_several_directions_of_factors_on_either_side_of_one_that_is_built(
    mlp: nn.Module,
    inputs: Tensor,
    assert_scores: CheckScores,
    draw_directions: Callable[..., Mapping[str, Gradients]],
) -> None:
    directions, first, last = draw_directions(mlp, 1), inputs + 1, inputs[:3] - 1
    engine = DotProductEngine(mlp, norms=True)
    for name, given in (("first", first), ("random 0", None), ("last", last)):
        if given is None:
            engine.add_direction(name, directions[name])
            continue
        loss = partial(lambda given: squares(mlp(given)).sum(), given)
        engine.add_direction(name, FactoredDirection(loss, len(given), keep="factors"))
    own = [gradient(mlp, squares(mlp(given)).sum()) for given in (first, last)]
    gradients = per_sample_gradients(mlp, squares(mlp(inputs)))
    with engine, engine.batch(range(4)) as batch:
        squares(mlp(inputs)).sum().backward()
    expected = {"first": own[0], "random 0": directions["random 0"], "last": own[1]}
    assert_scores(batch.result, gradients, expected)


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_tied_head_micro_batches_and_a_mean(
    mode: str,
    verify: bool,
    transformer: TinyTransformer,
    tokens: Tensor,
    others: Tensor,
    assert_scores: CheckScores,
    draw_directions: Callable[..., Mapping[str, Gradients]],
) -> None:
    """Two steps, of two micro-batches each, beside a direction of tensors."""
    plain = copy.deepcopy(transformer)
    given = draw_directions(transformer, 1)
    engine = DotProductEngine(transformer, mode=mode, norms=True, verify=verify)
    engine.add_direction("random 0", given["random 0"])

    def loss() -> Tensor:
        return next_token_losses(transformer(others), others).mean()

    engine.add_direction("val", FactoredDirection(loss, samples=2, keep="factors"))
    with engine:
        for _ in range(2):
            transformer.zero_grad()
            with engine.batch(range(5)) as batch:
                for part in tokens.split([2, 3]):
                    next_token_losses(transformer(part), part).sum().backward()
    own = per_sample_gradients(plain, next_token_losses(plain(tokens), tokens))
    direction = gradient(plain, next_token_losses(plain(others), others).mean())
    assert_scores(batch.result, own, {**given, "val": direction})
    check_norms_of(batch.result, own, {**given, "val": direction})
    with_factors, built = factored(engine)
    assert {"tokens.weight", "attend.weight", "narrow.weight"} <= with_factors
    assert {"attend.bias", "last.weight"} <= built
    for name, each in engine.direction("val").items():
        torch.testing.assert_close(each, direction[name], msg=name)
    for part in tokens.split([2, 3]):
        next_token_losses(plain(part), part).sum().backward()
    check_grads(plain, transformer, 0.0 if mode == "exact" else 1e-12)


@pytest.mark.parametrize(("tokens", "is_kept"), [(7, True), (8, False)])
def test_factors_are_kept_where_they_are_smaller(tokens: int, is_kept: bool) -> None:
    """Two samples of T tokens, 30 inputs and 32 outputs: 2 T (30 + 32) < 30 · 32 up to T = 7."""
    model = nn.Sequential(nn.Linear(30, 32), nn.Tanh(), nn.Linear(32, 2))
    batch, others = torch.randn(3, 4, 30), torch.randn(2, tokens, 30)
    engine = DotProductEngine(model)
    engine.add_direction("val", FactoredDirection(lambda: squares(model(others)).sum(), 2))
    with engine, engine.batch(range(3)):
        squares(model(batch)).sum().backward()
    found, built = factored(engine)
    assert found == ({"0.weight"} if is_kept else set())
    assert found | built == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_table_of_embeddings_is_not_built(tokens: Tensor) -> None:
    """Its one-hot inputs count as one number each."""
    model = nn.Sequential(nn.Embedding(1000, 4), nn.Linear(4, 3))
    engine = DotProductEngine(model)
    engine.add_direction("val", FactoredDirection(lambda: squares(model(tokens)).sum(), 5))
    with engine, engine.batch(range(5)):
        squares(model(tokens)).sum().backward()
    assert factored(engine)[0] == {"0.weight"}


def test_inputs_may_be_overwritten_when_the_loss_was_computed(
    mlp: nn.Module, inputs: Tensor, assert_scores: CheckScores
) -> None:
    """As by a loop that reads each validation batch into the same tensor."""
    others, plain = inputs.flip(0) * 0.7, copy.deepcopy(mlp)
    own = per_sample_gradients(plain, squares(plain(inputs)))
    direction = gradient(plain, squares(plain(others)).sum())
    engine = DotProductEngine(mlp)
    keep = FactoredDirection(lambda: squares(mlp(others)).sum(), 4, keep="factors")
    engine.add_direction("val", keep)
    with engine, engine.batch(range(4)) as batch:
        others.fill_(7.0)
        squares(mlp(inputs)).sum().backward()
    assert_scores(batch.result, own, {"val": direction})


def test_training_random_numbers_and_modes_are_left_alone() -> None:
    def train(with_engine: bool) -> tuple[TinyTransformer, Tensor]:
        torch.manual_seed(3)
        model, ids = TinyTransformer(), torch.arange(32 * 6).reshape(32, 6) % 19
        engine = DotProductEngine(model)

        def loss() -> Tensor:
            assert not model.training
            return next_token_losses(model(ids[:3]), ids[:3]).sum()

        engine.add_direction("val", FactoredDirection(loss, 3, keep="factors"))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            if with_engine:
                with engine, engine.batch(range(32)):
                    next_token_losses(model(ids), ids).mean().backward()
            else:
                next_token_losses(model(ids), ids).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.training
        return model, torch.rand(3)

    (plain, drawn), (watched, again) = train(False), train(True)
    assert torch.equal(drawn, again)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_frozen_pass(mlp: nn.Module, inputs: Tensor, assert_scores: CheckScores) -> None:
    own = per_sample_gradients(mlp, squares(mlp(inputs)))
    direction = gradient(mlp, squares(mlp(inputs)).sum())
    engine = DotProductEngine(mlp)
    keep = FactoredDirection(lambda: squares(mlp(inputs)).sum(), 4, keep="factors")
    engine.add_direction("val", keep)
    with engine.frozen(), engine.batch(range(4)) as batch:
        squares(mlp(inputs)).sum().backward()
    assert_scores(batch.result, own, {"val": direction})
    assert all(parameter.grad is None for parameter in mlp.parameters())


# Where it is built


def test_where_there_can_be_no_factors_it_is_built(mlp: nn.Module, inputs: Tensor) -> None:
    def loss() -> Tensor:
        return squares(mlp(inputs.flip(0))).sum()

    def total(engine: Any, direction: Any, **options: Any) -> Tensor:
        engine.add_direction("val", direction, **options)
        with engine, engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        assert not factored(engine)[0]
        return batch.result.total

    for kind, options in (
        (DotProductEngine, {"transform": unit_norm}),
        (partial(DotProductEngine, per_token=True), {}),
        (CosineEngine, {}),
    ):
        expected = total(kind(mlp), loss, **options)
        assert torch.equal(total(kind(mlp), FactoredDirection(loss, 4), **options), expected)
        with pytest.raises(CaptureError, match="cannot be kept as factors"):
            kind(mlp).add_direction("val", FactoredDirection(loss, 4, keep="factors"), **options)


def test_several_processes_average_what_is_built(mlp: nn.Module, inputs: Tensor) -> None:
    engine, ranks = DotProductEngine(mlp), SimpleNamespace(several=True)
    add = partial(
        direction_of, model=mlp, parameters=engine.parameters,
        refresh=None, transform=None, training=False, ranks=ranks, factors=True,
    )  # fmt: skip
    keep = FactoredDirection(lambda: squares(mlp(inputs)).sum(), 4)
    assert add("val", keep).factored is None
    with pytest.raises(CaptureError, match="each process would have factors of its own"):
        add("val", replace(keep, keep="factors"))


def test_candidates_and_second_order_use_the_same_loss(mlp: nn.Module, inputs: Tensor) -> None:
    def loss() -> Tensor:
        return squares(mlp(inputs.flip(0))).sum()

    def run(direction: Any) -> tuple[Tensor, dict[int, float]]:
        optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
        engine = DotProductEngine(mlp)
        engine.add_direction("val", direction)
        with engine, InRunValues(engine, optimizer, order=2) as values:
            with engine.scoring():
                scores = engine.score(lambda: squares(mlp(inputs)), range(4))
            with engine.batch(range(4)):
                squares(mlp(inputs)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            return scores.total, values.to_dict()

    dots, values = run(FactoredDirection(loss, 4, keep="factors"))
    expected, expected_values = run(loss)
    torch.testing.assert_close(dots, expected)
    assert values == pytest.approx(expected_values)


def test_states_and_files(mlp: nn.Module, inputs: Tensor, tmp_path: Any) -> None:
    """It is made anew in each batch, so that a state has nothing of it."""

    def make() -> DotProductEngine:
        engine = DotProductEngine(mlp)
        keep = FactoredDirection(lambda: squares(mlp(inputs)).sum(), 4, keep="factors")
        engine.add_direction("val", keep)
        return engine

    def total(engine: DotProductEngine) -> Tensor:
        with engine, engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        return batch.result.total

    engine, other = make(), make()
    first = total(engine)
    other.load_state_dict(engine.state_dict())
    assert torch.equal(total(other), total(engine))
    save_direction(tmp_path / "val.safetensors", engine.direction("val"))
    loaded = DotProductEngine(mlp)
    loaded.add_direction("val", load_direction(tmp_path / "val.safetensors"))
    torch.testing.assert_close(total(loaded), first)


# Refused


def test_what_makes_no_direction_is_refused(mlp: nn.Module, inputs: Tensor) -> None:
    def loss() -> Tensor:
        return squares(mlp(inputs)).sum()

    with pytest.raises(CaptureError, match="function of nothing"):
        FactoredDirection(loss(), 4)
    with pytest.raises(CaptureError, match="samples"):
        FactoredDirection(loss, 0)
    with pytest.raises(UnknownNameError, match=r"cheapest.*built, cheaper, factors"):
        FactoredDirection(loss, 4, keep="cheapest")
    engine = DotProductEngine(mlp)
    with pytest.raises(CaptureError, match="factors are captured before each batch"):
        engine.add_direction("val", FactoredDirection(loss, 4), refresh=10)
    engine.add_direction("val", FactoredDirection(loss, 4, keep="built"), refresh=10)
    with pytest.raises(CaptureError, match="takes arguments"):
        engine.add_direction("val", FactoredDirection(lambda model: loss(), 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss, mlp: loss * float("nan"), "the closure's loss is nan"),
        (lambda loss, mlp: loss.detach(), "must return a scalar loss"),
        (lambda loss, mlp: loss.expand(2), "must return a scalar loss"),
        (lambda loss, mlp: loss.backward() or loss, r"called backward\(\)"),
        (lambda loss, mlp: loss.backward(retain_graph=True) or loss, r"called backward\(\)"),
        (lambda loss, mlp: dict(mlp.named_parameters()), "must return a scalar loss"),
        (lambda loss, mlp: torch.ones(1, requires_grad=True).sum(), "depends on none|no gradient"),
    ],
    ids=[
        "not finite",
        "no graph",
        "two",
        "backpropagated",
        "and kept",
        "a mapping",
        "of something else",
    ],
)
def test_losses_that_have_no_gradient_are_refused(
    change: Callable[..., Any], message: str, mlp: nn.Module, inputs: Tensor
) -> None:
    engine = DotProductEngine(mlp)
    keep = FactoredDirection(lambda: change(squares(mlp(inputs)).sum(), mlp), 4, keep="factors")
    engine.add_direction("val", keep)
    with engine, pytest.raises(CaptureError, match=message), engine.batch(range(4)):
        pass
    # What was attached is as it was.
    engine.add_direction("val", lambda: squares(mlp(inputs)).sum())
    with engine, engine.batch(range(4)) as batch:
        squares(mlp(inputs)).sum().backward()
    assert batch.verified
    assert all(parameter.requires_grad for parameter in mlp.parameters())


def test_another_number_of_samples_is_refused(mlp: nn.Module, inputs: Tensor) -> None:
    engine = DotProductEngine(mlp)
    engine.add_direction("val", FactoredDirection(lambda: squares(mlp(inputs)).sum(), 3))
    with engine, pytest.raises(CaptureError, match="4 samples"), engine.batch(range(4)):
        pass


def test_an_open_batch_of_another_engine_is_refused(mlp: nn.Module, inputs: Tensor) -> None:
    engine, other = DotProductEngine(mlp), DotProductEngine(mlp)
    keep = FactoredDirection(lambda: squares(mlp(inputs)).sum(), 4)
    engine.add_direction("val", keep)
    other.add_direction("val", keep.loss)
    with engine, other:
        with engine.batch(range(4)), other.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        assert batch.verified
        with other.batch(range(4)):
            with (
                pytest.raises(CaptureError, match="batch of another engine is open"),
                engine.batch(range(4)),
            ):
                pass
            squares(mlp(inputs)).sum().backward()


# Broken on purpose


@pytest.mark.parametrize("fault", ["a use dropped", "a sample dropped"])
def test_a_fault_is_found(
    fault: str, transformer: TinyTransformer, tokens: Tensor, others: Tensor,
    assert_scores: CheckScores, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dots_with = ghost_engines.dot_product.dots_with

    def wrong(uses: Any, given: Any) -> Tensor:
        if fault == "a use dropped":
            return dots_with(uses[:1], given)
        return dots_with([each.narrow(slice(1, None)) for each in uses], given)

    def compare() -> None:
        engine = DotProductEngine(transformer)
        loss = lambda: next_token_losses(transformer(others), others).sum()  # noqa: E731
        engine.add_direction("val", FactoredDirection(loss, 2, keep="factors"))
        with engine, engine.batch(range(5)) as batch:
            next_token_losses(transformer(tokens), tokens).sum().backward()
        assert_scores(batch.result, own, {"val": direction})

    own = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    direction = gradient(transformer, next_token_losses(transformer(others), others).sum())
    compare()
    monkeypatch.setattr(ghost_engines.dot_product, "dots_with", wrong)
    with pytest.raises(AssertionError, match="entries are off"):
        compare()
