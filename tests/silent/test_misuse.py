"""What makes numbers useless is noticed and said once, naming the cause."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.silent.compare import drawn, squares
from torch import nn

from ghost_core import CaptureError, WrongSplitError
from ghost_core.testing import GradientHolder
from ghost_engines import (
    DotProductEngine,
    GradientStore,
    NormEngine,
    ProjectionEngine,
    StoreError,
)

N = 4


def mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 2)).double()


ENGINES: dict[str, Callable[[nn.Module], object]] = {
    "holder": GradientHolder,
    "norms": lambda model: NormEngine(model, loss_weights="sum"),
    "projections": lambda model: ProjectionEngine(model, dim=4),
}


@pytest.mark.parametrize("where", ["inputs", "weights", "one loss"])
@pytest.mark.parametrize("name", ENGINES)
def test_nan_in_the_first_batch_is_not_verified(name: str, where: str) -> None:
    """NaN is what the probe looks for: where there is some already, it tells nothing."""
    model, x, engine = mlp(), drawn(N, 3), None
    if where == "inputs":
        x[1] = float("nan")
    if where == "weights":
        model[0].weight.data[0, 0] = float("nan")
    engine = ENGINES[name](model)
    verified = None
    try:
        with engine, engine.batch(range(N)) as batch:  # type: ignore[attr-defined]
            losses = squares(model(x))
            if where == "one loss":
                losses = losses * torch.tensor([1, float("nan"), 1, 1], dtype=torch.float64)
            losses.sum().backward()
        verified = batch.verified
    except CaptureError as error:
        assert "nan" in str(error).lower() or "finite" in str(error)  # noqa: PT017
    assert verified is not True


class Centred(nn.Module):
    """Mixes samples where it is told to."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
        self.mixes = mixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner[:2](x)
        mixed: torch.Tensor = self.inner[2](y - y.mean(0) if self.mixes else y)
        return mixed


@pytest.mark.parametrize("how", ["attached", "frozen"])
@pytest.mark.parametrize("mixes", [False, True])
def test_the_batch_after_nan_is_verified_in_its_place(
    mixes: bool, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = GradientHolder(model := Centred(mixes))
    x = drawn(N, 3)
    x[1] = float("nan")
    with caplog.at_level(logging.WARNING), engine if how == "attached" else engine.frozen():
        for _ in range(2):
            with engine.batch(range(N)) as batch:
                squares(model(x)).sum().backward()
            assert not batch.verified
        assert len(caplog.records) == 1
        assert "NaN" in caplog.text
        refused = pytest.raises(WrongSplitError) if mixes else contextlib.nullcontext()
        with refused, engine.batch(range(N)) as batch:
            squares(model(drawn(N, 3))).sum().backward()
        assert mixes or batch.verified


def test_nan_that_the_model_hides_is_no_proof_either() -> None:
    """Its gradients are finite, and numbers of its samples are not."""

    class Hides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nan_to_num()

    engine = GradientHolder(model := nn.Sequential(mlp(), Hides()))
    x = drawn(N, 3)
    x[1] = float("nan")
    with engine, engine.batch(range(N)) as batch:
        squares(model(x)).sum().backward()
    assert not batch.verified


def test_nan_where_rows_are_folded_is_refused_with_its_cause() -> None:
    """Nothing tells how rows are folded then."""
    inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.inner(x.flatten(0, 1))).unflatten(0, x.shape[:2])

    engine = GradientHolder(model := Folded())
    x = drawn(N, 2, 3)
    x[1] = float("nan")
    with engine:
        refused = pytest.raises(WrongSplitError, match="NaN in the model's output")
        with refused, engine.batch(range(N)):
            model(x).square().sum().backward()
        with engine.batch(range(N)) as batch:
            model(drawn(N, 2, 3)).square().sum().backward()
        assert batch.verified


def test_nan_after_the_first_batch_is_not_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    """The split is proven by then."""
    engine, x = GradientHolder(model := mlp()), drawn(N, 3)
    with caplog.at_level(logging.WARNING), engine:
        for _ in range(2):
            with engine.batch(range(N)) as batch:
                squares(model(x)).sum().backward()
            assert batch.verified
            x[1] = float("nan")
    assert not caplog.records


def test_direction_from_a_nan_model_is_refused() -> None:
    model = mlp()
    model[0].weight.data[0, 0] = float("nan")
    engine = DotProductEngine(model)
    engine.add_direction("validation", lambda: squares(model(drawn(N, 3))).mean())
    with pytest.raises(CaptureError, match="not finite"), engine, engine.batch(range(N)):
        squares(model(drawn(N, 3))).sum().backward()


def stored(model: nn.Module, folder: Path, ids: list[range]) -> None:
    """Store the rows of some batches."""
    engine = ProjectionEngine(model, dim=4)
    with GradientStore.create(folder, engine) as store, engine.frozen():
        for at in ids:
            with engine.batch(at) as batch:
                squares(model(drawn(N, 3))).sum().backward()
            store.append(batch.result)


def test_dropout_while_rows_are_stored_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        stored(mlp(0.5).train(), tmp_path / "rows", [range(N), range(N, 2 * N)])
    said = [each for each in caplog.records if "dropout" in each.getMessage().lower()]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("module", "drops"),
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout1d(1), True),
        (nn.Dropout(0.0), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.LSTM(3, 3, 2, dropout=0.5), True),
        (nn.GRU(3, 3), False),
        (nn.PairwiseDistance(p=1.0), False),
    ],
    ids=repr,
)
def test_modules_that_drop_are_named(
    module: nn.Module, drops: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = mlp()
    model.append(nn.Identity())
    model[3].aside = module  # not called: a module is told by its settings
    with caplog.at_level(logging.WARNING):
        stored(model, tmp_path / "rows", [range(N)])
    assert ("3.aside" in caplog.text and "model.eval()" in caplog.text) == drops
    assert len(caplog.records) == drops


@pytest.mark.parametrize("size", [1, 3, 4])
def test_rows_of_an_earlier_writer_are_known(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However ids are ordered, and whichever shard they are in."""
    engine = ProjectionEngine(model := mlp().eval(), dim=4)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)) - 12

    def append(store: GradientStore, ids: torch.Tensor) -> None:
        with engine.batch(ids) as batch:
            squares(model(drawn(len(ids), 3))).sum().backward()
        store.append(batch.result)

    with caplog.at_level(logging.WARNING), engine.frozen():
        with GradientStore.create(tmp_path, engine, unit=5) as store:
            for ids in order[:12].split(size):
                append(store, ids)
        with GradientStore.resume(tmp_path, engine) as store:
            for ids in order[12:].split(size):
                append(store, ids)
            assert not caplog.records
        for again in order.tolist():
            with (
                GradientStore.resume(tmp_path, engine) as store,
                pytest.raises(StoreError, match=f"samples {again} are stored already"),
            ):
                append(store, torch.tensor([100 + again, again]))
    assert GradientStore.open(tmp_path).ids.tolist() == order.tolist()


def test_nothing_is_said_in_evaluation_mode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        stored(mlp(0.5).eval(), tmp_path / "rows", [range(N), range(N, 2 * N)])
    assert not caplog.records


def test_rows_appended_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="stored already"):
        stored(mlp().eval(), tmp_path / "rows", [range(N), range(N)])
    assert len(GradientStore.open(tmp_path / "rows")) == N
