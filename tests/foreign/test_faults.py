"""Seeded faults: what mixes samples, and owners that are wrong, is refused, not split."""

from __future__ import annotations

import pytest
import torch
from tests.foreign.foreign import curved, shuffled
from tests.foreign.graphs import GCN, _graphs
from torch import Tensor, nn

from ghost_core import GhostError
from ghost_core.testing import GradientHolder

N = 4
OWNED = {"row_owner": {"first*": "batch", "second*": "batch"}}


def batch_of_graphs() -> dict[str, Tensor]:
    made = {name: torch.as_tensor(value) for name, value in _graphs(N).items()}
    return {n: each.double() if each.is_floating_point() else each for n, each in made.items()}


def joined(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add an edge from the first graph to the last."""
    last = len(batch["x"]) - 1
    return batch | {"edge_index": torch.cat((batch["edge_index"], torch.tensor([[0], [last]])), 1)}


def swapped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tell that a node of the first graph was one of the second, and the other way round."""
    owner = batch["batch"].clone()
    owner[[1, 2]] = owner[[2, 1]]
    return batch | {"batch": owner}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_lifted_modules_that_mix_samples(frozen: bool, later: bool) -> None:
    """An edge between graphs, in the first batch or in a later one."""
    model = shuffled(GCN()).double()
    engine = GradientHolder(model)
    with engine.frozen() if frozen else engine:
        if later:
            with engine.batch(range(N)) as batch:
                curved(model(**batch_of_graphs())).sum().backward()
            assert batch.verified
        with pytest.raises(GhostError, match="cannot be split by sample"):  # noqa: SIM117
            with engine.batch(range(N)):
                curved(model(**joined(batch_of_graphs()))).sum().backward()


class Pooled(GCN):
    """Takes the owners that the engine was told for something else than pooling."""

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, pool: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, edge_index, pool)


@pytest.mark.parametrize("frozen", [False, True])
def test_wrong_owners_of_what_is_lifted(frozen: bool) -> None:
    model, graphs = shuffled(Pooled()).double(), batch_of_graphs()
    engine = GradientHolder(model, **OWNED)
    wrong = {**swapped(graphs), "pool": graphs["batch"]}
    refused = pytest.raises(GhostError, match="do not belong to the samples that 'batch' tells")
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        curved(model(**wrong)).sum().backward()


class Drifting(nn.Module):
    """A table for all samples, which a sample changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(3, 8), nn.Embedding(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table(torch.arange(1)) * self.layer(x)[:1].tanh()
        return self.layer(x) + table


@pytest.mark.parametrize("frozen", [False, True])
def test_shared_values_that_one_sample_changes(frozen: bool) -> None:
    model, x = Drifting().double(), torch.randn(N, 3, dtype=torch.float64)
    engine = GradientHolder(model)
    with (
        engine.frozen() if frozen else engine,
        pytest.raises(GhostError),
        engine.batch(range(N)),
    ):
        curved(model(x)).sum().backward()
