"""What an architecture of the zoo is: a model, its batches, and one loss per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core.testing.snapshots import seeded

Batch = Mapping[str, Any]
"""Inputs of the model by name, and what else its losses need."""

Losses = Callable[[nn.Module, Batch], Tensor]
"""Runs a model on a batch and returns one loss per sample, `[N]`."""


@dataclass(frozen=True)
class Family:
    """An architecture with its default options, tiny and random.

    Attributes:
        make: Makes the model, in float32.
        batch: Makes a batch of N samples of T tokens (frames, patches).
        losses: The losses of its samples.
        tokens: T of most tests.
        square: T of the test with as many samples as tokens.
        stochastic: Whether training mode draws random numbers with the default options.
        dtype: Dtype of the model and its inputs.
        in_float32: Code because of which autograd has float32's precision only.
        zero: Globs of parameters on which the losses do not depend, whose gradients autograd
            leaves at rounding errors.
        unused: Globs of parameters that play no part in evaluation.
        options: Options of the engine.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    losses: Losses
    tokens: int = 7
    square: int = 5
    stochastic: bool = False
    dtype: torch.dtype = torch.float64
    in_float32: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def case(
        self,
        n: int,
        tokens: int | None = None,
        *,
        training: bool = False,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> Case:
        """Make a model and a batch of N samples of T tokens."""
        dtype = dtype or self.dtype
        with seeded(seed):
            model = shuffled(self.make()).to(dtype).train(training)
            batch = self.batch(n, self.tokens if tokens is None else tokens)
        batch = {
            name: value.to(dtype) if _is_float(value) else value for name, value in batch.items()
        }
        return Case(self, model, batch, n)


@dataclass(frozen=True)
class Case:
    """A model and a batch of N samples for it."""

    family: Family
    model: nn.Module
    batch: Batch
    n: int

    def losses(self) -> Tensor:
        """Run the model and return one loss per sample, `[N]`, in float64.

        Random numbers are the same every time, and the global generators stay as they are.
        """
        with seeded(1):
            losses = self.family.losses(self.model, self.batch)
        assert losses.shape == (self.n,)
        assert losses.dtype == torch.float64
        return losses


def shuffled(model: nn.Module) -> nn.Module:
    """Move parameters away from zeros and ones, behind which gradients may vanish."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def curved(values: Tensor) -> Tensor:
    """Return a loss per sample, `[N, ...]` to `[N]`, whose slope differs for every element."""
    flat = values.double().flatten(1)
    slopes = torch.linspace(0.5, 1.5, flat.shape[1], dtype=torch.float64)
    return (torch.sin(flat * slopes) + 0.3 * flat.square() * slopes.flip(0)).sum(1)


def lengths_of(n: int, tokens: int, least: int = 3) -> Tensor:
    """Return N lengths from `least` to T, in a mixed order; the longest is there."""
    lengths = least + (torch.arange(n) * 2 + tokens - least) % (tokens - least + 1)
    assert lengths.max() == tokens
    return lengths


def mask_of(lengths: Tensor, tokens: int, left: bool = False) -> Tensor:
    """Return the attention mask `[N, T]` of lengths `[N]`, padded on the right or the left."""
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return mask.flip(1) if left else mask


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
