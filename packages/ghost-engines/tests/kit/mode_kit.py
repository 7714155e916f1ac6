"""Runs examples of the table under a mode of the dot product engine, and compares all it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core.testing import (
    LAYERS,
    VARIANTS,
    LayerExample,
    assert_within,
    dense,
    losses,
    per_sample_gradients,
)
from ghost_engines import DotProductEngine, Scores

Gradients = Mapping[str, Tensor]

CheckScores = Callable[..., None]
"""Compares scores with gradients and directions."""

EXACT = {n: example for n, example in (LAYERS | VARIANTS).items() if example.refusal is None}

TIED = (
    "embedding tied to a head",
    "embedding tied to a head with a bias",
    "embedding tied to a head, as many tokens as samples",
    "bag, embedding and head tied, mean",
    "parameter shared with a linear layer",
)

PROBED = (
    "linear, sorted",
    "lstm, packed",
    "gru, packed, both directions",
    "embedding bag, offsets, max, the last one",
)
"""Beside folded rows: whose rows are in which place only a verified batch can tell."""


def table(samples: int = 1) -> list[object]:
    """Return the names of the table, all but a thin slice of it for the stress tests.

    Args:
        samples: The fewest samples that examples have.
    """
    quick = {*list(EXACT)[::41], *(name for name in EXACT if "used twice" in name)}
    quick = {name for name in (*quick, *TIED) if not EXACT[name].generic}
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.stress)
        for name, example in EXACT.items()
        if example.n >= samples
    ]


def reference(example: LayerExample) -> dict[str, Tensor]:
    """Ask autograd for each sample's gradient; that of a scalar is `[N, 1]`."""
    model = dense(example.build())
    gradients = per_sample_gradients(model, losses(example, model, example.draw()))
    return {name: each if each.dim() > 1 else each[:, None] for name, each in gradients.items()}


def beside(
    model: nn.Module, mode: str, directions: Mapping[str, Gradients], **options: Any
) -> DotProductEngine:
    """Return an engine, of a mode that trains as ever, with directions."""
    engine = DotProductEngine(model, mode=mode, **options)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    return engine


def concatenated(model: nn.Module, **options: Any) -> DotProductEngine:
    """Return an engine that validation samples go through the model for."""
    return DotProductEngine(model, mode="concatenated", **options)


def tell_sizes(engine: DotProductEngine, n: int, m: int) -> None:
    """Let an engine know of batches that are joined already."""
    engine.concatenate(torch.zeros(n, n, n), torch.zeros(m, m, m), pad=0)


def check_beside(
    example: LayerExample,
    mode: str,
    directions: Mapping[str, Gradients],
    assert_scores: CheckScores,
) -> None:
    """Assert what an exact or fused engine gives: dots, norms and `.grad`.

    In a batch that is verified, and in one that is not: there a fused engine makes the gradients.
    """
    plain, gradients = example.build(), reference(example)
    losses(example, plain, example.draw()).sum().backward()
    for verified in (True, False):
        model, batches = example.build(), batches_of(example, verified)
        verify = verified or batches > 1
        engine = beside(model, mode, directions, norms=True, verify=verify, **example.options)
        with engine:
            for _ in range(batches):
                model.zero_grad()
                with engine.batch(range(example.n)) as batch:
                    losses(example, model, example.draw()).sum().backward()
        assert_scores(batch.result, gradients, directions)
        check_norms_of(batch.result, gradients, directions)
        check_grads(plain, model, 0.0 if mode == "exact" else 1e-9, f"verified={verified}")


def check_concatenated(example: LayerExample, assert_scores: CheckScores) -> None:
    """Assert what a concatenated engine gives, where the last sample is of validation."""
    n, gradients, plain = example.n - 1, reference(example), example.build()
    train = {name: each[:n] for name, each in gradients.items()}
    direction = {name: each[n:].sum(0) for name, each in gradients.items()}
    for name, rows in train.items():
        parameter = plain.get_parameter(name)
        parameter.grad = rows.sum(0).reshape(parameter.shape)
    for verified in (True, False):
        model, batches = example.build(), batches_of(example, verified)
        verify = verified or batches > 1
        engine = concatenated(model, norms=True, verify=verify, **example.options)
        with engine:
            for _ in range(batches):
                model.zero_grad()
                tell_sizes(engine, n, 1)
                with engine.batch(range(n)) as batch:
                    each = losses(example, model, example.draw())
                    engine.backward(each, train_weight=1, validation_weight=1)
        assert_scores(batch.result, train, {"validation": direction})
        check_norms_of(batch.result, train, {"validation": direction})
        check_grads(plain, model, 1e-9, f"verified={verified}")


def batches_of(example: LayerExample, verified: bool) -> int:
    """Return how many batches to run: rows that are to be found need one that is verified first."""
    probed = example.name.startswith("folded") or example.name in PROBED
    return 2 if probed and not verified else 1


def check_norms_of(
    scores: Scores, gradients: Gradients, directions: Mapping[str, Gradients]
) -> None:
    """Assert that norms and cosines are those of per-sample gradients, `[N, *shape]` by name."""
    assert scores.squared_norms is not None
    assert scores.squared_norms.keys() == scores.norms_by_parameter.keys() == gradients.keys()
    for name, gradient in gradients.items():
        rows = gradient.flatten(1).double()
        columns = torch.stack([each[name].flatten().double() for each in directions.values()])
        norms = rows.norm(dim=1)
        assert_within(scores.squared_norms[name], norms**2, norms**2, 2e-9, f"norms of {name}")
        assert_within(scores.norms_by_parameter[name], norms, norms, what=f"norms of {name}")
        _check_cosines(scores.cosines_by_parameter[name], rows, columns, name)
    rows = torch.cat([gradient.flatten(1).double() for gradient in gradients.values()], 1)
    columns = torch.stack(
        [
            torch.cat([each[name].flatten().double() for name in gradients])
            for each in directions.values()
        ]
    )
    assert_within(scores.norms, rows.norm(dim=1), rows.norm(dim=1), what="norms")
    _check_cosines(scores.cosines, rows, columns, "whole gradients")


def _check_cosines(got: Tensor, rows: Tensor, columns: Tensor, what: str) -> None:
    expected = functional.normalize(rows) @ functional.normalize(columns).mT
    known = rows.any(1)[:, None] & columns.any(1)  # a norm of zero has no angle
    assert got[~known].isnan().all()
    assert_within(got[known], expected[known], 1.0, what=f"cosines of {what}")


def check_grads(
    plain: nn.Module, model: nn.Module, tolerance: float = 1e-12, what: str = "training"
) -> None:
    """Assert that `.grad` is that of plain training, up to rounding."""
    others = dict(model.named_parameters())
    compared = False
    for name, parameter in plain.named_parameters():
        wanted, got = parameter.grad, others[name].grad
        if wanted is None or got is None:
            assert wanted is got, f"{what}: {name}.grad is there on one side only"
            continue
        wanted, got = wanted.to_dense(), got.to_dense()
        assert_within(got, wanted, wanted.norm().double(), tolerance, f"{what}, {name}.grad")
        compared = compared or bool(wanted.any())
    assert compared, "all gradients are zero, so nothing would be tested"
