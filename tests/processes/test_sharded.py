"""FSDP2: other engines, other models, mistakes and faults, on two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.processes.oracle import WORLD
from tests.processes.sharded import FAULTS, MISTAKES, RESHARDS, direction, language, texts
from tests.processes.test_two_processes import check, close
from tests.processes.training import FSDP, losses, net, samples
from tests.processes.wrapped import MINE
from torch import Tensor, nn

from ghost_core.testing import per_sample_gradients
from ghost_engines import NormEngine, ProjectionEngine

pytestmark = pytest.mark.stress

Found = list[dict[str, Any]]


def wanted(model: nn.Module, inputs: Tensor) -> list[float]:
    """Return the dots of samples' parts in the average with `direction`."""
    gradients = per_sample_gradients(model, losses(model(inputs)))
    given = direction(model)
    parts = [(gradients[name] * given[name]).flatten(1).sum(1) for name in gradients]
    found: list[float] = (torch.stack(parts).sum(0) / WORLD).tolist()
    return found


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", RESHARDS)
def test_rows_and_norms_are_those_of_one_process(found: Found, name: str, rank: int) -> None:
    got, ids, model = found[rank]["sharded"]["others"][name], MINE[rank], net()
    projection = ProjectionEngine(model, dim=4, min_dim=2)
    norms = NormEngine(model, loss_weights="sum")
    with projection, norms, projection.batch(ids), norms.batch(ids):
        losses(model(samples()[ids])).sum().backward()
    close(got["rows"], projection.collect().rows.tolist(), "rows")
    close(got["norms"], norms.collect().total.tolist(), "norms")


@pytest.mark.parametrize("rank", range(WORLD))
def test_language_model_with_checkpoints_and_a_tied_head(found: Found, rank: int) -> None:
    got = found[rank]["sharded"]["others"]["language"]
    close(got, wanted(language(), texts()[MINE[rank]]), "dots")


@pytest.mark.parametrize("name", ["half", "half, fused"])
@pytest.mark.parametrize("rank", range(WORLD))
def test_mixed_precision(found: Found, rank: int, name: str) -> None:
    got = torch.tensor(found[rank]["sharded"]["others"][name])
    expected = torch.tensor(wanted(net(), samples()[MINE[rank]]))
    assert float((got - expected).norm()) < 0.05 * float(expected.norm())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refused_in_every_process(found: Found, mistake: str) -> None:
    for each in found:
        assert MISTAKES[mistake][1] in each["sharded"]["refusals"][mistake]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(found: Found, fault: str) -> None:
    with pytest.raises(AssertionError):
        check(FSDP[1], [each["sharded"]["faults"][fault] for each in found])
