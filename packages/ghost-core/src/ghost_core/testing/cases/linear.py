"""Linear layers: input ranks, layouts, frozen parameters, subclasses, what happens to outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ghost_core.testing.cases import roots
from ghost_core.testing.examples import LayerExample as Example
from ghost_core.testing.examples import N, named, normal


class Renamed(nn.Linear):
    """Adds a method and an attribute, and leaves the forward pass as it is."""

    gain = 2.0

    def doubled(self, inputs: Tensor) -> Tensor:
        """Return twice the output."""
        outputs: Tensor = self(inputs)
        return self.gain * outputs


def _linear() -> nn.Linear:
    return nn.Linear(6, 7)


def _no_bias() -> nn.Linear:
    return nn.Linear(6, 7, bias=False)


def _square() -> nn.Linear:
    return nn.Linear(6, 6)


def _lazy() -> nn.Module:
    module = nn.LazyLinear(7)
    module(torch.zeros(2, 6))
    return module


LINEAR = named(
    "linear",
    [
        Example("linear", _linear, (normal(N, 6),)),
        Example("linear, no bias", _no_bias, (normal(N, 6),)),
        Example("linear, tokens", _linear, (normal(N, 3, 6),)),
        Example("linear, tokens, no bias", _no_bias, (normal(N, 3, 6),)),
        Example("linear, as many tokens as samples", _linear, (normal(N, N, 6),)),
        Example("linear, as many tokens as samples, no bias", _no_bias, (normal(N, N, 6),)),
        Example("linear, two axes of tokens", _linear, (normal(N, 2, 3, 6),)),
        Example("linear, two axes of tokens, no bias", _no_bias, (normal(N, 2, 3, 6),)),
        Example("linear, two axes of as many tokens as samples", _linear, (normal(N, 1, N, 6),)),
        Example("linear, three axes of tokens", _linear, (normal(N, 2, 1, 3, 6),)),
        Example("linear, only the weight", _linear, (normal(N, 6),), frozen=("bias",)),
        Example("linear, only the bias", _linear, (normal(N, 6),), frozen=("weight",)),
        Example("linear, tokens, only the weight", _linear, (normal(N, 3, 6),), frozen=("bias",)),
        Example("linear, tokens, only the bias", _linear, (normal(N, 3, 6),), frozen=("weight",)),
        Example(
            "linear, as many tokens as samples, only the bias",
            _linear,
            (normal(N, N, 6),),
            frozen=("weight",),
        ),
        Example("linear, transposed", lambda: roots.Transposed(_linear()), (normal(N, 6, 3),)),
        Example("linear, sorted", lambda: roots.Sorted(_linear()), (normal(N, 3, 6),)),
        Example("linear, strided", lambda: roots.Strided(_linear()), (normal(N, 3, 12),)),
        Example("linear, expanded", lambda: roots.Expanded(_linear()), (normal(N, 6),)),
        Example("linear, expanded, no bias", lambda: roots.Expanded(_no_bias()), (normal(N, 6),)),
        Example("linear, input by keyword", lambda: roots.Named(_linear()), (normal(N, 3, 6),)),
        Example(
            "linear, of multi-head attention",
            lambda: NonDynamicallyQuantizableLinear(6, 7),
            (normal(N, 3, 6),),
        ),
        Example("linear, subclass", lambda: Renamed(6, 7), (normal(N, 3, 6),)),
        Example("linear, changed in place", lambda: roots.InPlace(_linear()), (normal(N, 6),)),
        Example(
            "linear, tokens, changed in place",
            lambda: roots.InPlace(_linear()),
            (normal(N, 3, 6),),
        ),
        Example("linear, added in place", lambda: roots.Residual(_square()), (normal(N, 3, 6),)),
        Example(
            "linear, behind an activation in place",
            lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 7)),
            (normal(N, 3, 6),),
        ),
        Example(
            "linear, behind dropout in training",
            lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 7)),
            (normal(N, 3, 6),),
        ),
    ],
)

LINEAR_VARIANTS = named(
    "linear",
    [
        Example("linear, square", lambda: nn.Linear(7, 7), (normal(N, 7),)),
        Example("linear, one output", lambda: nn.Linear(15, 1), (normal(N, 15),)),
        Example("linear, one input", lambda: nn.Linear(1, 7), (normal(N, 3, 1),)),
        Example("linear, many tokens", _linear, (normal(N, 40, 6),), n=3),
        Example("linear, one token", _linear, (normal(N, 1, 6),)),
        Example("linear, one sample", _linear, (normal(N, 3, 6),), n=1),
        Example("linear, two samples", _no_bias, (normal(N, 3, 6),), n=2),
        Example("linear, lazily initialised", _lazy, (normal(N, 6),)),
    ],
)
