"""Weights that are computed from other parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ghost_core.testing.cases import roots
from ghost_core.testing.examples import VOCABULARY, LayerExample, N, indices, named, normal

Example = partial(LayerExample, generic=True)


class Symmetric(nn.Module):
    """Makes a square weight symmetric."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the symmetric weight."""
        return weight.triu() + weight.triu(1).mT


class Scaled(nn.Module):
    """Multiplies a weight by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight scaled."""
        return self.scale * weight


def _parametrized(layer: nn.Module, *parametrization: nn.Module, name: str = "weight") -> nn.Module:
    for each in parametrization:
        parametrize.register_parametrization(layer, name, each)
    return layer


_TOKENS, _CHANNELS = (normal(N, 3, 6),), (normal(N, 6, 5),)


def _examples() -> Iterator[LayerExample]:
    linear, square = partial(nn.Linear, 6, 7), partial(nn.Linear, 6, 6)
    weight_norm, spectral_norm = parametrizations.weight_norm, parametrizations.spectral_norm
    yield Example("weight norm, linear", lambda: weight_norm(linear()), _TOKENS)
    yield Example("weight norm, linear, no tokens", lambda: weight_norm(linear()), (normal(N, 6),))
    yield Example(
        "weight norm, whole",
        lambda: weight_norm(linear(), dim=None),  # type: ignore[arg-type]
        _TOKENS,
    )
    yield Example(
        "weight norm, only the lengths",
        lambda: weight_norm(linear()),
        _TOKENS,
        frozen=("parametrizations.weight.original1", "bias"),
    )
    yield Example("weight norm, conv1d", lambda: weight_norm(nn.Conv1d(6, 5, 3)), _CHANNELS)
    yield Example(
        "weight norm, embedding",
        lambda: weight_norm(nn.Embedding(VOCABULARY, 5)),
        (indices(N, 6),),
    )
    yield Example("weight norm, used twice", lambda: roots.Repeated(weight_norm(square())), _TOKENS)
    yield Example("spectral norm, in evaluation", lambda: spectral_norm(linear()).eval(), _TOKENS)
    yield Example("spectral norm, in training", lambda: spectral_norm(linear()), _TOKENS)
    yield Example(
        "spectral norm, conv1d, in training", lambda: spectral_norm(nn.Conv1d(6, 5, 3)), _CHANNELS
    )
    yield Example(
        "orthogonal, exponential",
        lambda: parametrizations.orthogonal(square(), orthogonal_map="matrix_exp"),
        _TOKENS,
    )
    yield Example(
        "orthogonal, Cayley",
        lambda: parametrizations.orthogonal(square(), orthogonal_map="cayley"),
        _TOKENS,
    )
    yield Example(
        "orthogonal, Householder",
        lambda: parametrizations.orthogonal(square(), orthogonal_map="householder"),
        _TOKENS,
    )
    yield Example("symmetric", lambda: _parametrized(square(), Symmetric()), _TOKENS)
    yield Example("scaled by a parameter", lambda: _parametrized(linear(), Scaled()), _TOKENS)
    yield Example("scaled bias", lambda: _parametrized(linear(), Scaled(), name="bias"), _TOKENS)
    yield Example(
        "two parametrisations", lambda: _parametrized(square(), Symmetric(), Scaled()), _TOKENS
    )
    yield Example(
        "parametrised between others",
        lambda: nn.Sequential(linear(), nn.Tanh(), weight_norm(nn.Linear(7, 5))),
        _TOKENS,
    )


PARAMETRIZED = named("parametrised", _examples())
