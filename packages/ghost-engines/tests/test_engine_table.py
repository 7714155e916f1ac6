"""What all engines promise, and their numbers over the table of layers, against autograd's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn

from ghost_core.algebra import matrix_shape
from ghost_core.testing import LAYERS, LayerExample, check_engine
from ghost_engines import (
    CosineEngine,
    DotProductEngine,
    GramEngine,
    NormEngine,
    ProjectionEngine,
    ScoringEngine,
)

Gradients = Mapping[str, Tensor]

A_FEW = [
    "linear, tokens", "linear, used twice", "conv2d, stride", "embedding, padding",
    "layer norm, tokens", "one weight in two linear layers", "embedding tied to a head",
    "sequence first, linear", "folded, sample minor", "rows of samples, linear",
    "one row multiplied", "gru", "scale, a scalar", "weight norm, linear",
]  # fmt: skip
"""An example of each way in which gradients come."""


@dataclass(frozen=True)
class Subject:
    """An engine and what its numbers are to be.

    Attributes:
        make: Makes the engine.
        expected: Computes the numbers from gradients, `[N, *shape]` by name.
        values: Picks them from the engine's result.
    """

    make: Callable[..., Any]
    expected: Callable[[Gradients], Tensor]
    values: Callable[[Any], Tensor]


def direction(name: str, shape: Size, number: int) -> Tensor:
    """Draw a direction for a parameter, the same wherever it is asked for."""
    seed = zlib.crc32(f"{name} {number}".encode())
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scoring(kind: type[ScoringEngine[Any]]) -> Callable[..., ScoringEngine[Any]]:
    """Return what makes an engine with two directions."""

    def make(model: nn.Module, **options: Any) -> ScoringEngine[Any]:
        engine = kind(model, **options)
        for number in range(2):
            given = {
                each.name: direction(each.name, each.shape, number) for each in engine.parameters
            }
            engine.add_direction(f"random {number}", given)
        return engine

    return make


def rows(gradients: Gradients) -> Tensor:
    """Return whole gradients as rows."""
    return torch.cat([each.reshape(len(each), -1) for each in gradients.values()], dim=1)


def columns(gradients: Gradients) -> Tensor:
    """Return the two directions as columns, in the order of `rows`."""
    parts = [
        [direction(name, each.shape[1:], number).flatten() for name, each in gradients.items()]
        for number in range(2)
    ]
    return torch.stack([torch.cat(part) for part in parts], dim=1)


def angles(gradients: Gradients) -> Tensor:
    """Return cosines with the directions; NaN, which stands for none, as zero."""
    own, others = rows(gradients), columns(gradients)
    return (own @ others / own.norm(dim=1)[:, None] / others.norm(dim=0)).nan_to_num()


class Projected:
    """Makes the projection engine, whose maps the expected rows are computed with."""

    def make(self, model: nn.Module, **options: Any) -> ProjectionEngine:
        self.engine = ProjectionEngine(model, dim=12, min_dim=2, dtype="float64", **options)
        return self.engine

    def expected(self, gradients: Gradients) -> Tensor:
        parts = []
        for block in self.engine.layout:
            left, right = (each.double() for each in self.engine.maps(block.parameter))
            gradient = gradients[block.parameter]
            matrix = gradient.reshape(len(gradient), *matrix_shape(block.shape))
            parts.append((left @ matrix @ right.mT).flatten(1))
        return torch.cat(parts, dim=1)


def subjects() -> dict[str, Subject]:
    projected = Projected()
    return {
        "dot products": Subject(
            scoring(DotProductEngine),
            lambda gradients: rows(gradients) @ columns(gradients),
            lambda scores: scores.total,
        ),
        "cosines": Subject(
            scoring(CosineEngine), angles, lambda cosines: cosines.cosines.nan_to_num()
        ),
        "norms": Subject(
            lambda model, **options: NormEngine(model, loss_weights="sum", **options),
            lambda gradients: rows(gradients).norm(dim=1),
            lambda norms: norms.total,
        ),
        "Grams": Subject(
            lambda model, **options: GramEngine(model, loss_weights="sum", **options),
            lambda gradients: rows(gradients) @ rows(gradients).mT,
            lambda gram: gram.total,
        ),
        "projections": Subject(projected.make, projected.expected, lambda batch: batch.rows),
    }


@pytest.mark.parametrize(
    ("examples", "steps"),
    [
        pytest.param({name: LAYERS[name] for name in A_FEW}, 3, id="a few"),
        pytest.param(LAYERS, 20, id="all", marks=pytest.mark.stress),
    ],
)
@pytest.mark.parametrize(
    "name",
    [  # cosines are made of dots and norms, which are there
        pytest.param(name, marks=pytest.mark.stress if name == "cosines" else ())
        for name in subjects()
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_engines_keep_what_every_engine_promises(
    name: str, examples: Mapping[str, LayerExample], steps: int
) -> None:
    subject = subjects()[name]
    check_engine(
        subject.make,
        expected=subject.expected,
        values=subject.values,
        examples=examples,
        steps=steps,
    )


@pytest.mark.parametrize(
    ("examples", "steps"),
    [
        pytest.param({name: LAYERS[name] for name in A_FEW}, 3, id="a few"),
        pytest.param(LAYERS, 20, id="all", marks=pytest.mark.stress),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_concatenated_mode_keeps_what_every_engine_promises(
    examples: Mapping[str, LayerExample], steps: int
) -> None:
    def expected(train: Gradients, validation: Gradients) -> Tensor:
        return rows(train) @ rows(validation).sum(0)

    check_engine(
        partial(DotProductEngine, mode="concatenated"),
        expected=expected,
        values=lambda scores: scores.total[:, 0],
        examples=examples,
        gradient_error=1e-6,
        concatenated=True,
        steps=steps,
    )


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "samples in another order": lambda values: values.flip(0),
    "one sample left out": lambda values: values.index_fill(0, torch.tensor([0]), 0.0),
    "another sign": torch.neg,
    "a little more": lambda values: values * (1 + 1e-5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_numbers_of_engines_would_be_found(fault: str) -> None:
    subject = subjects()["dot products"]
    with pytest.raises(AssertionError, match=r"linear, tokens: .* entries are off"):
        check_engine(
            subject.make,
            expected=subject.expected,
            values=lambda scores: FAULTS[fault](scores.total),
            examples={"linear, tokens": LAYERS["linear, tokens"]},
        )
