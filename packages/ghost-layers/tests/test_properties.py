"""Every operation is exact for whatever shapes and options hypothesis comes up with."""

from __future__ import annotations

import pytest
from drawn_layers import FEW, MANY, convolution, embedding, embedding_bag, layers, linear
from hypothesis import given

from ghost_core.testing import LayerExample, capture, check_operations

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def check(example: LayerExample) -> None:
    first, second = capture(example, [example.n, max(1, example.n - 1)])
    for name, gradients in first.items():
        check_operations(gradients, second[name], what=f"{example}, {name}")


@FEW
@given(linear())
def test_linear(example: LayerExample) -> None:
    check(example)


@FEW
@given(convolution())
def test_convolution(example: LayerExample) -> None:
    check(example)


@FEW
@given(embedding())
def test_embedding(example: LayerExample) -> None:
    check(example)


@FEW
@given(embedding_bag())
def test_embedding_bag(example: LayerExample) -> None:
    check(example)


@pytest.mark.stress
@MANY
@given(layers())
def test_many(example: LayerExample) -> None:
    check(example)
