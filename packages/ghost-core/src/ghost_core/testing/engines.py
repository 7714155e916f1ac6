"""The conformance test of engines: what they promise to every training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import Batch, Engine
from ghost_core.state import RandomState
from ghost_core.testing.cases import LAYERS
from ghost_core.testing.examples import LayerExample
from ghost_core.testing.feeds import Alone, Feed, Joined, LossesOf
from ghost_core.testing.oracle import assert_within
from ghost_core.testing.results import EngineFactory, Expected, ExpectedOfBoth, check_results
from ghost_core.testing.snapshots import (
    Watched,
    assert_untouched,
    live_tensors,
    seeded,
    traces,
)
from ghost_core.testing.tiny import TinyTransformer, next_token_losses

N = 32
MICRO_BATCHES = 2
TOKENS = 6


def check_engine(
    make_engine: EngineFactory,
    *,
    expected: Expected | ExpectedOfBoth | None = None,
    values: Callable[[Any], Tensor] | None = None,
    examples: Mapping[str, LayerExample] = LAYERS,
    tolerance: float = 1e-6,
    covers: Callable[[Any], int] | None = None,
    gradient_error: float | None = 0.0,
    result_holds_capture: bool = False,
    concatenated: bool = False,
    steps: int = 20,
) -> None:
    """Assert that an engine keeps what every engine promises.

    A `TinyTransformer` is trained with AdamW, two micro-batches of 32 samples a step, gradient
    clipping and dropout, in float32 and under bfloat16 autocast, with and without the engine:

    * parameters are bit-identical, and so are the random number generators of torch, numpy and
      Python afterwards;
    * after leaving, also by an exception in the batch, in the forward or in the backward pass:
      hooks, attributes and `requires_grad` are as found, and no captured tensor lives;
    * twice `steps` short batches leave no more tensors behind than `steps`;
    * the result has one row per sample;
    * two engines at once change nothing either, where one alone leaves training bit-identical;
    * `frozen()` makes no weight gradient and restores `requires_grad`;
    * an option that does not exist is a `TypeError`.

    With `concatenated=True` each micro-batch is joined with samples of validation by
    `engine.concatenate(train, validation)`, samples on axis `engine.tracking.batch_dim`, goes
    through the model in a batch of its own, and is backpropagated by
    `engine.backward(losses, train_weight=..., validation_weight=...)`, as in that mode of
    `DotProductEngine`. `.grad` is to be that of the training samples alone, and the result to have
    a row for each of them. Examples of one sample are left out.

    With `expected`, numbers are compared as well, in float64: for every example, and for a
    `TinyTransformer`, whose head is tied to its embedding, in one pass, in micro-batches, in two
    passes of the same samples, with `layers=...`, with a gradient scaler, which is to leave no
    trace in the result, and in a `frozen()` pass.

        check_engine(SquaredNorms, expected=lambda gradients: sum(
            rows.reshape(len(rows), -1).square().sum(1) for rows in gradients.values()))

    Args:
        make_engine: Makes an engine for a model that maps token ids, int64 `[N, T]` below 19, to
            logits `[N, T, 19]`. With `expected`: for any model, with the options of `Engine` that
            it is given by keyword.
        expected: Computes the result, a tensor, from the gradients of the samples by autograd,
            float64 `[N, *shape]` by the first name of each parameter selected. With
            `concatenated=True` it takes those of the training samples and those of validation.
        values: Picks from a result what `expected` computes; by default, the result is a tensor.
        examples: What numbers are compared for, by name.
        tolerance: Error allowed in them, relative to the largest number of the result.
        covers: Returns how many samples a result covers; by default, the result is searched for a
            tensor with one row per sample.
        gradient_error: Error that the engine may make in `.grad`, relative to its norm, in
            float32. Zero stands for bit-identical training. None is for engines that give the
            model another gradient on purpose: then nothing is compared.
        result_holds_capture: Whether the engine's result consists of what was captured, as that of
            `GradientHolder` does: then memory is looked at after the engine is gone.
        concatenated: Whether the engine takes training and validation samples in one batch.
        steps: Optimizer steps; and half of the short batches.

    Raises:
        AssertionError: Naming what changed, and when; or the number that is wrong.
        ValueError: If a result is no tensor and `values` does not say what of it is expected, or
            `gradient_error` is zero with `concatenated=True`.
    """
    feed: Feed = Joined() if concatenated else Alone()
    if concatenated and gradient_error == 0.0:
        raise ValueError(
            "an engine that takes validation samples in the batch has to make the gradients: say "
            "how far they may be off with check_engine(gradient_error=...)"
        )
    if expected is not None:
        check_results(make_engine, expected, values, examples, tolerance, concatenated)
    _check_unknown_option(make_engine)
    for autocast in (False, True):
        how = "under bfloat16 autocast" if autocast else "in float32"
        plain = _train((), autocast, steps, feed)
        watched = _train((make_engine,), autocast, steps, feed)
        _compare(plain, watched, gradient_error, how)
        for batch in watched.batches:
            _check_covers(batch, covers)
        if gradient_error == 0.0:
            both = _train((make_engine, make_engine), autocast, 3, feed)
            _compare(_train((), autocast, 3, feed), both, gradient_error, f"{how}, two engines")
            for batch in both.batches:
                _check_covers(batch, covers)
    _check_leaving(make_engine, result_holds_capture, feed)
    _check_many_batches(make_engine, steps, feed)
    _check_frozen(make_engine, covers, feed)


@dataclass
class _Trained:
    model: TinyTransformer
    first_grads: dict[str, Tensor]
    random: dict[str, object]
    batches: list[Batch[Any]]


def _train(factories: Sequence[EngineFactory], autocast: bool, steps: int, feed: Feed) -> _Trained:
    model = _model()
    found = traces(model)
    engines = [factory(model) for factory in factories]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2
    )
    first_grads: dict[str, Tensor] = {}
    batches: list[Batch[Any]] = []
    with seeded(1):
        with ExitStack() as attached:
            for engine in engines:
                attached.enter_context(engine)
            for step in range(steps):
                optimizer.zero_grad()
                batches = _step(model, engines, autocast, step, feed)
                first_grads = first_grads or _gradients(model)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        state = RandomState.now().by_library
    assert_untouched(found, model, "after training")
    return _Trained(model, first_grads, state, batches)


def _step(
    model: TinyTransformer, engines: Sequence[Engine[Any]], autocast: bool, step: int, feed: Feed
) -> list[Batch[Any]]:
    """Run forward and backward of one step; the batches' ids tell steps apart."""
    n = MICRO_BATCHES * N
    ids = torch.arange(n) + step * n
    losses_of = _losses_of(model, autocast)
    return feed.run(engines, _tokens(n, seed=step).split(N), ids, losses_of, 1 / n)


def _losses_of(model: TinyTransformer, autocast: bool = False) -> LossesOf:
    def losses_of(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens)
        return next_token_losses(logits, tokens)

    return losses_of


def _compare(plain: _Trained, watched: _Trained, error: float | None, how: str) -> None:
    if plain.random != watched.random:
        changed = [name for name in plain.random if plain.random[name] != watched.random[name]]
        raise AssertionError(f"{how}: the engine drew from the generator of {', '.join(changed)}")
    if error is None:
        return
    if error > 0:
        # bfloat16 has 16 bits fewer than float32
        bound = error if how == "in float32" else max(error, 2e-2)
        for name, expected in plain.first_grads.items():
            scale = float(expected.norm())
            assert_within(watched.first_grads[name], expected, scale, bound, f"{how}, {name}.grad")
        return
    others = dict(watched.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        if not torch.equal(parameter, others[name]):
            apart = (parameter - others[name]).detach().abs().max().item()
            raise AssertionError(
                f"{how}: the engine changed training: {name} differs by up to {apart:.3g}"
            )


def _check_covers(batch: Batch[Any], covers: Callable[[Any], int] | None) -> None:
    if covers is not None:
        if (count := covers(batch.result)) != batch.n:
            raise AssertionError(f"the result covers {count} samples of {batch.n}")
    elif not any(leaf.dim() and leaf.shape[0] == batch.n for leaf in tensors_in(batch.result)):
        raise AssertionError(
            f"the result, {type(batch.result).__name__}, holds no tensor with {batch.n} rows; if "
            "it is right, tell check_engine(covers=...) how to count them"
        )


class _InterruptionError(Exception):
    """Stands for whatever may happen inside a batch."""


def _check_leaving(make_engine: EngineFactory, result_holds_capture: bool, feed: Feed) -> None:
    for where in ("nowhere", "in the batch", "in the forward pass", "in the backward pass"):
        model = _model()
        found, when = traces(model), f"after an exception {where}"
        watched = Watched(model)
        engine: Engine[Any] | None = make_engine(model)
        assert engine is not None
        try:
            with watched, engine:
                _interrupted(engine, model, where, feed)
        except _InterruptionError:
            pass
        assert_untouched(found, model, when)
        if not watched.count:
            raise AssertionError(f"{when}: no activation was seen, so nothing was tested")
        if result_holds_capture:
            engine = None
        if alive := watched.alive():
            raise AssertionError(f"{when}: captured tensors are alive: {', '.join(alive)}")
        _check_usable(make_engine, model, feed)


def _interrupted(engine: Engine[Any], model: TinyTransformer, where: str, feed: Feed) -> None:
    """Run a batch, forward and backward, with an exception somewhere."""

    def interrupt(*_: Any) -> None:
        raise _InterruptionError

    def interrupt_backward(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(interrupt)

    def losses_of(tokens: Tensor) -> Tensor:
        handles = []
        if where == "in the forward pass":
            handles.append(model.narrow.register_forward_hook(interrupt))
        if where == "in the backward pass":  # when half of the gradients have arrived
            handles.append(model.leave.register_forward_hook(interrupt_backward))
        try:
            losses = _losses_of(model)(tokens)
        finally:
            for handle in handles:
                handle.remove()
        if where == "in the batch":
            raise _InterruptionError
        return losses

    feed.run([engine], [_tokens(N, seed=0)], torch.arange(N), losses_of, 1.0)


def _check_usable(make_engine: EngineFactory, model: TinyTransformer, feed: Feed) -> None:
    """Assert that the next batches work."""
    engine = make_engine(model)
    with engine:
        for step in range(2):
            _step(model, [engine], False, step, feed)


def _check_many_batches(make_engine: EngineFactory, steps: int, feed: Feed) -> None:
    model = _model()
    engine, tokens, counts = make_engine(model), _tokens(2, seed=0), []
    losses_of, ids = _losses_of(model), torch.arange(2)
    with engine:
        for _ in range(2):
            for _ in range(steps):
                feed.run([engine], [tokens], ids, losses_of, 1.0)
            counts.append(live_tensors())
    if counts[1] > counts[0]:
        raise AssertionError(
            f"{2 * steps} batches left {counts[1]} tensors behind, {steps} left {counts[0]}: "
            "memory grows"
        )


def _check_frozen(
    make_engine: EngineFactory, covers: Callable[[Any], int] | None, feed: Feed
) -> None:
    model = _model()
    found, engine, tokens = traces(model), make_engine(model), _tokens(N, seed=0)
    with engine.frozen():
        (batch,) = feed.run([engine], [tokens], torch.arange(N), _losses_of(model), 1.0)
    assert_untouched(found, model, "after frozen()")
    _check_covers(batch, covers)
    if made := [name for name, p in model.named_parameters() if p.grad is not None]:
        raise AssertionError(f"frozen() made gradients of {', '.join(made)}")


def _check_unknown_option(make_engine: EngineFactory) -> None:
    model = _model()
    kind = type(make_engine(model))
    try:
        kind(model, no_such_option=True)  # type: ignore[call-arg]
    except TypeError as error:
        if "no_such_option" in str(error):
            return
        raise AssertionError(f"a TypeError that does not name the option: {error}") from error
    raise AssertionError(f"{kind.__name__} takes an option that does not exist")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a result: in mappings, sequences, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield from tensors_in(getattr(value, each.name))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | Engine):
        yield from tensors_in(vars(value))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _model() -> TinyTransformer:
    with seeded(0):
        return TinyTransformer()


def _tokens(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 19, (n, TOKENS), generator=generator)
