"""Models, batches and comparisons with autograd that the tests of the engines share."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from token_kit import VOCABULARY, Packed
from torch import Tensor, nn

from ghost_core.testing import TinyTransformer, assert_within
from ghost_engines import DotProductEngine, ProjectedRows, ProjectionEngine, Scores

Gradients = Mapping[str, Tensor]


def check_scores(scores: Scores, gradients: Gradients, directions: Mapping[str, Gradients]) -> None:
    """Assert that scores are the dots of per-sample gradients with directions.

    Args:
        scores: What the engine found.
        gradients: The reference, `[N, *shape]` by parameter name.
        directions: Each of `*shape` by parameter name, in the order of their columns.
    """
    assert scores.directions == tuple(directions)
    assert scores.by_parameter.keys() == gradients.keys()
    assert scores.by_parameter
    total, bound = torch.tensor(0.0), torch.tensor(0.0)
    layers: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        assert gradient.any(), f"the reference of {name} is zero, so nothing would be tested"
        rows = gradient.flatten(1).double()
        columns = torch.stack([each[name].flatten().double() for each in directions.values()], 1)
        expected = rows @ columns
        scale = rows.norm(dim=1)[:, None] * columns.norm(dim=0)
        assert_within(scores.by_parameter[name], expected, scale, what=name)
        total, bound = total + expected, bound + scale
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, torch.tensor(0.0)) + expected
    assert_within(scores.total, total, bound, what="total")
    assert scores.by_layer.keys() == layers.keys()
    for layer, expected in layers.items():
        assert_within(scores.by_layer[layer], expected, bound, what=layer)


def check_rows(engine: ProjectionEngine, batch: ProjectedRows, gradients: Gradients) -> None:
    """Assert that rows are `L g Rᵀ`, block by block, of per-sample gradients `[N, *shape]`."""
    assert [block.parameter for block in engine.layout] == sorted(gradients)
    assert batch.rows.shape == (len(batch.ids), engine.k_total)
    for block in engine.layout:
        gradient = gradients[block.parameter].double()
        assert gradient.any(), f"the reference of {block.parameter} is zero"
        left, right = (each.double() for each in engine.maps(block.parameter))
        matrices = gradient.reshape(len(gradient), left.shape[1], right.shape[1])
        expected = (left @ matrices @ right.mT).flatten(1)
        maps = torch.linalg.matrix_norm(left, 2) * torch.linalg.matrix_norm(right, 2)
        scale = matrices.flatten(1).norm(dim=1)[:, None] * maps
        assert_within(batch.rows[:, block.columns], expected, scale, what=block.parameter)


def random_directions(model: nn.Module, count: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Draw directions over all trainable parameters, as float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"random {at}": {
            name: torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        for at in range(count)
    }


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` formats stack traces, too
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def assert_scores() -> Callable[..., None]:
    return check_scores


@pytest.fixture
def assert_rows() -> Callable[..., None]:
    return check_rows


@pytest.fixture
def draw_directions() -> Callable[..., dict[str, dict[str, Tensor]]]:
    return random_directions


@pytest.fixture
def mlp() -> nn.Module:
    """Maps `[N, 5]` or `[N, T, 5]` to 3 outputs, in float64."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.fixture
def transformer() -> TinyTransformer:
    """A language model with a tied head and position embeddings, in float64 without dropout."""
    return TinyTransformer().double().eval()


@pytest.fixture
def tokens() -> Tensor:
    """Token ids of 5 samples, for `transformer`."""
    return torch.randint(0, 19, (5, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs() -> Tensor:
    """Inputs of 4 samples, for `mlp`."""
    return torch.randn(4, 5, dtype=torch.float64)


@pytest.fixture
def sequences() -> Tensor:
    """Inputs of 4 samples with 4 tokens each, for `mlp`."""
    return torch.randn(4, 4, 5, dtype=torch.float64)


@pytest.fixture
def engine(mlp: nn.Module, draw_directions: Callable[..., Mapping[str, Gradients]]):
    """An engine with one direction of tensors."""
    engine = DotProductEngine(mlp)
    engine.add_direction("given", draw_directions(mlp, 1)["random 0"])
    return engine


@pytest.fixture
def model() -> nn.Module:
    """A language model for packed documents."""
    return Packed().double()


@pytest.fixture
def ids() -> Tensor:
    """Token ids of 3 samples, for `model`."""
    return torch.randint(0, VOCABULARY, (3, 6))
