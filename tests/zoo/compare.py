"""Compares ghost's per-sample gradients of a case with autograd's."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from tests.zoo.family import Case
from torch import Tensor

from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.testing.oracle import norms, per_row
from ghost_core.tracking import as_patterns

EXACT, FLOAT32 = 1e-9, 1e-6
"""Errors allowed relative to norms, where autograd computes in float64 and in float32."""

ROUNDING = 1e-12
"""What counts as zero, relative to the norm of a sample's whole gradient."""


def held_gradients(case: Case, *, frozen: bool = False) -> dict[str, Tensor]:
    """Return ghost's gradients `[N, *shape]` by parameter name, in training or a frozen pass."""
    options = case.family.options
    engine = GradientHolder(case.model, **options)
    owners = {key: case.batch[key] for key in options.get("row_owner", {}).values()}
    attached = engine.frozen() if frozen else engine
    with attached, engine.batch(range(case.n), owners=owners) as batch:
        case.losses().sum().backward()
    assert batch.verified
    return batch.result.materialize()


def compare(case: Case, *, frozen: bool = False) -> None:
    """Assert that every trainable parameter's gradients are autograd's, sample by sample.

    The reference is a forward pass of its own, without hooks, with the same random numbers. The
    gradients that training gets must be those it gets without ghost, bit by bit.
    """
    excluded = tuple(as_patterns(case.family.options.get("exclude", ())))
    reference = per_sample_gradients(case.model, case.losses())
    expected = {name: each for name, each in reference.items() if not matches(name, excluded)}
    trained = {} if frozen else training_gradients(case)
    held = held_gradients(case, frozen=frozen)
    check_training(case, trained)
    check_gradients(case, held, expected)


def check_gradients(case: Case, held: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that gradients `[N, *shape]` by name are as expected, relative to their norms.

    Where the losses do not depend on a parameter, the norm of the whole gradient stands in.
    """
    assert held.keys() == expected.keys()
    whole = torch.stack([norms(gradient) for gradient in expected.values()]).norm(dim=0)
    tolerance = FLOAT32 if case.family.in_float32 else EXACT
    unused = () if case.model.training else case.family.unused
    for name, gradient in expected.items():
        scale = norms(gradient)
        if matches(name, unused):
            assert not gradient.any(), name
        if matches(name, case.family.zero + unused):
            assert (scale <= ROUNDING * whole).all(), name
            scale = whole
        else:
            assert (scale > ROUNDING * whole).any(), f"{name}: nothing would be tested"
        assert_within(held[name], gradient, per_row(scale, gradient), tolerance, name)


def training_gradients(case: Case) -> dict[str, Tensor | None]:
    """Return what a backward pass without ghost leaves in `.grad`, by parameter name."""
    case.losses().sum().backward()
    gradients = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    case.model.zero_grad()
    return gradients


def check_training(case: Case, expected: dict[str, Tensor | None]) -> None:
    """Assert that `.grad` is bit-identical to what it is without ghost, and clear it."""
    for name, parameter in case.model.named_parameters():
        grad = expected.get(name)
        same = parameter.grad is grad if grad is None else torch.equal(parameter.grad, grad)
        assert same, f".grad of {name} is not what it is without ghost"
    case.model.zero_grad()


def matches(name: str, globs: tuple[str, ...]) -> bool:
    """Return whether a name matches one of the globs."""
    return any(fnmatchcase(name, glob) for glob in globs)
