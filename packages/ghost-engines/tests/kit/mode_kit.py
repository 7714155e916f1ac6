"""Runs examples of the table under a mode of the dot product engine, and compares all it gives."""

from __future__ import annotations

from collections.abc import Mapping

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
from ghost_engines import Scores

Gradients = Mapping[str, Tensor]

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
    quick = {*list(EXACT)[::23], *(name for name in EXACT if "used twice" in name)}
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
