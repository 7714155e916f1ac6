from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ghost_core.testing import GradientHolder, assert_within, check_sampler, per_sample_gradients
from ghost_layers.replay import GenericSampler

from .modules import Behind, check, doubles, losses, registry


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), [(3, 4, 3, 2)]),
        (nn.Bilinear(3, 4, 5), [(4, 3), (4, 4)]),
        (nn.PReLU(3), [(4, 3, 2)]),
        *(  # along other axes
            pytest.param(*each, marks=pytest.mark.stress)
            for each in (
                (nn.ConvTranspose1d(3, 4, 2, stride=2), [(3, 3, 5)]),
                (nn.ConvTranspose3d(2, 3, 2), [(3, 2, 2, 3, 2)]),
            )
        ),
    ],
)
def test_layers_of_torch(module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    check_sampler(GenericSampler, module, *[torch.randn(shape) for shape in shapes])


def test_used_twice() -> None:
    check_sampler(GenericSampler, nn.PReLU(3), torch.randn(4, 3, 2), uses=2)


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "spectral norm of a convolution": lambda: parametrizations.spectral_norm(nn.Conv1d(4, 3, 1)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "Cayley": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized(kind: str, training: bool) -> None:
    model = Behind(PARAMETRIZED[kind]()).double().train(training)
    shape = (5, 4, 4) if isinstance(model.module, nn.Conv1d) else (5, 4)
    engine = check(model, doubles(*shape))
    assert any("parametrizations" in parameter.name for parameter in engine.parameters)


def test_parametrized_with_cached_values() -> None:
    model = Behind(parametrizations.weight_norm(nn.Linear(4, 3))).double()
    expected = per_sample_gradients(model, losses(model(inputs := doubles(5, 4))))
    engine = GradientHolder(model, registry=registry(), lift=False)
    with parametrize.cached(), engine, engine.batch(range(5)) as batch:
        losses(model(inputs)).sum().backward()
    for name, held in batch.result.materialize().items():
        assert_within(held, expected[name], expected[name].norm())


def test_one_of_the_parametrized() -> None:
    model = Behind(parametrizations.weight_norm(nn.Linear(4, 3))).double()
    check(model, doubles(5, 4), layers="*original0")
