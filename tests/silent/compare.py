"""One autograd call per sample against what ghost says, and the training beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tests.foreign.foreign import assert_same, assert_same_training
from torch import Tensor, nn

from ghost_core import GhostError
from ghost_core.testing import GradientHolder, per_sample_gradients

Losses = Callable[[], Tensor]
"""Runs the model and returns one loss per sample, `[N]`."""

WAYS = ("attached", "frozen")


def holds(
    model: nn.Module, losses: Losses, way: str, expected: Mapping[str, Tensor], **options: object
) -> None:
    """Assert that gradients are those expected, in the first batch and in a later one.

    Raises:
        AssertionError: Where they are others.
        GhostError: Where the model is refused.
    """
    engine = GradientHolder(model, **options)
    n = len(next(iter(expected.values())))
    with engine.frozen() if way == "frozen" else engine:
        for _ in range(2):  # the first one is watched
            with engine.batch(range(n)) as batch:
                losses().sum().backward()
            held = batch.result.materialize()
            model.zero_grad()
            assert_same(held, {name: expected[name] for name in held})


def exact_or_refused(
    model: nn.Module,
    losses: Losses,
    way: str,
    *,
    plain: tuple[nn.Module, Losses] | None = None,
    **options: object,
) -> str:
    """Assert that a batch is exact, unless it is refused; return which.

    Args:
        model: The model, in float64.
        losses: Runs it.
        way: One of `WAYS`.
        plain: A twin that the oracle can differentiate twice, and what runs it, where needed.
        options: Options of the engine.
    """
    asked, run = plain or (model, losses)
    expected = per_sample_gradients(asked, run())
    try:
        holds(model, losses, way, expected, **options)
    except GhostError:
        model.zero_grad()
        return "refused"
    return "exact"


def left_by_backward(model: nn.Module, losses: Losses) -> dict[str, Tensor | None]:
    """Return what a backward pass leaves in `.grad`, and clear it."""
    losses().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_training_untouched(model: nn.Module, losses: Losses, n: int, **options: object) -> None:
    """Assert that `.grad` is bit by bit what it is without ghost, unless the model is refused."""
    expected = left_by_backward(model, losses)
    engine = GradientHolder(model, **options)
    try:
        with engine, engine.batch(range(n)):
            found = left_by_backward(model, losses)
    except GhostError:
        model.zero_grad()
        return
    assert_same_training(found, expected)


class Counted(torch.autograd.Function):
    """Counts backward passes."""

    runs = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        Counted.runs += 1
        return grad


def drawn(*shape: int) -> Tensor:
    """Return random numbers in float64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def squares(output: Tensor) -> Tensor:
    """Return a loss per sample, `[N, ...]` to `[N]`."""
    return output.square().flatten(1).sum(1)
