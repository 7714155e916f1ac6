"""The whole table of layers under each mode, and whatever layers hypothesis comes up with.

Two examples of the table have one sample: in concatenated mode they would have nothing to train on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from drawn_layers import FEW, MANY, layers
from hypothesis import HealthCheck, assume, given, settings
from mode_kit import (
    EXACT,
    Gradients,
    beside,
    check_beside,
    check_concatenated,
    concatenated,
    reference,
    table,
    tell_sizes,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core import GhostError
from ghost_core.testing import LAYERS, LayerExample, losses

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

MODES = ("exact", "fused", "concatenated")
REFUSED = [name for name, example in LAYERS.items() if example.refusal is not None]

CheckScores = Callable[..., None]
Draw = Callable[[nn.Module, int], Mapping[str, Gradients]]


def check(example: LayerExample, mode: str, assert_scores: CheckScores, draw: Draw) -> None:
    """Assert that all that a mode gives is autograd's."""
    if mode == "concatenated":
        check_concatenated(example, assert_scores)
    else:
        check_beside(example, mode, draw(example.build(), 2), assert_scores)


@pytest.mark.parametrize("name", table())
def test_fused(name: str, assert_scores: CheckScores, draw_directions: Draw) -> None:
    check(EXACT[name], "fused", assert_scores, draw_directions)


@pytest.mark.parametrize("name", table(samples=2))
def test_concatenated(name: str, assert_scores: CheckScores, draw_directions: Draw) -> None:
    check(EXACT[name], "concatenated", assert_scores, draw_directions)


@pytest.mark.stress
@pytest.mark.parametrize("name", EXACT)
def test_exact_with_norms(name: str, assert_scores: CheckScores, draw_directions: Draw) -> None:
    """Without norms the default tests have it, all of the table: see `test_every_layer.py`."""
    check(EXACT[name], "exact", assert_scores, draw_directions)


# What is refused


def marked(at: int, name: str) -> object:
    return pytest.param(name, marks=() if at % 6 == 0 else pytest.mark.stress)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [marked(*each) for each in enumerate(REFUSED)])
def test_what_is_refused_is_refused_in_each_mode(
    name: str, mode: str, draw_directions: Draw
) -> None:
    example = LAYERS[name]
    with pytest.raises(GhostError, match=example.refusal):
        run(example, mode, draw_directions)


def run(example: LayerExample, mode: str, draw: Draw) -> None:
    """Run one batch under a mode."""
    model, inputs = example.build(), example.draw()
    for leaf in tree_leaves(inputs[:2]):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_()
    if mode != "concatenated":
        engine = beside(model, mode, draw(model, 1), **example.options)
        with engine, engine.batch(range(example.n)):
            losses(example, model, inputs).sum().backward()
        return
    engine = concatenated(model, **example.options)
    tell_sizes(engine, example.n - 1, 1)
    with engine, engine.batch(range(example.n - 1)):
        each = losses(example, model, inputs)
        engine.backward(each, train_weight=1, validation_weight=1)


# Whatever hypothesis comes up with


def check_drawn(example: LayerExample, mode: str, assert_scores: CheckScores, draw: Draw) -> None:
    """Check a layer that was drawn, unless nothing would be tested."""
    train = example.n - (mode == "concatenated")
    assume(train and all(each[:train].any() for each in reference(example).values()))
    check(example, mode, assert_scores, draw)


FIXTURES = HealthCheck.function_scoped_fixture  # they return functions


@pytest.mark.parametrize("mode", MODES)
@settings(FEW, max_examples=5, suppress_health_check=[*FEW.suppress_health_check, FIXTURES])
@given(example=layers())
def test_drawn(
    mode: str, example: LayerExample, assert_scores: CheckScores, draw_directions: Draw
) -> None:
    check_drawn(example, mode, assert_scores, draw_directions)


@pytest.mark.stress
@pytest.mark.parametrize("mode", MODES)
@settings(MANY, max_examples=400, suppress_health_check=[*FEW.suppress_health_check, FIXTURES])
@given(example=layers())
def test_many_drawn(
    mode: str, example: LayerExample, assert_scores: CheckScores, draw_directions: Draw
) -> None:
    check_drawn(example, mode, assert_scores, draw_directions)
