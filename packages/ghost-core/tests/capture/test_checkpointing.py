"""Activation checkpointing: recomputed calls are not counted, hidden ones are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError, checkpoint

from ghost_core import (
    CaptureError,
)
from ghost_core.testing import (
    GradientHolder,
    per_sample_gradients,
)

N, T, D = 4, 3, 6
Hold = Callable[..., GradientHolder]
Exact = Callable[..., None]


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (N, T, D), dtype=torch.float64)


def squares(output: Tensor) -> Tensor:
    return output.square().flatten(1).sum(1)


class Checkpointed(nn.Module):
    """Checkpoints a block; the embedding inside it has integer inputs."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, D)
        self.block = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.last = nn.Linear(D, 2)
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        if self.reentrant:
            x = checkpoint(self.block, self.tokens(ids), use_reentrant=True)
        else:
            x = checkpoint(lambda i: self.block(self.tokens(i)), ids, use_reentrant=False)
        return self.last(x)


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_is_exact(hold: Hold, assert_held, frozen: bool) -> None:
    model, ids = Checkpointed(False).double(), torch.randint(0, 11, (N, T))
    torch.manual_seed(1)
    expected = per_sample_gradients(model, squares(model(ids)))
    engine = hold(model)
    torch.manual_seed(1)
    with engine.frozen() if frozen else engine, engine.batch(range(N)) as batch:
        squares(model(ids)).sum().backward()
    assert_held(batch.result, expected)


@pytest.mark.parametrize("verify", [True, False])
def test_reentrant_checkpointing_is_refused_with_the_remedy(hold: Hold, verify: bool) -> None:
    model, ids = Checkpointed(True).double(), torch.randint(0, 11, (N, T))
    engine = hold(model, verify=verify)
    with (
        engine,
        pytest.raises(CaptureError, match="use_reentrant=False"),
        engine.batch(range(N)),
    ):
        squares(model(ids)).sum().backward()


def test_verifying_reentrant_checkpoints_is_refused_with_the_remedy(hold: Hold) -> None:
    model, ids = Checkpointed(True).double(), torch.randint(0, 11, (N, T))
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        hold(model).verify(lambda: squares(model(ids)))


def test_checkpointing_with_micro_batches_of_different_sizes(hold: Hold, assert_held) -> None:
    model, ids = Checkpointed(False).double().eval(), torch.randint(0, 11, (N, T))
    expected = per_sample_gradients(model, squares(model(ids)))
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        for part in ids.split([1, 3]):
            squares(model(part)).sum().backward()
    assert_held(batch.result, expected)


def test_checkpointed_shared_positions(hold: Hold, assert_held) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, D), nn.Embedding(T, D)

        def embed(self, ids: Tensor) -> Tensor:
            return self.tokens(ids) * self.positions(torch.arange(T)[None])

        def forward(self, ids: Tensor) -> Tensor:
            return checkpoint(self.embed, ids, use_reentrant=False)

    model, ids = Model().double(), torch.randint(0, 11, (N, T))
    expected = per_sample_gradients(model, squares(model(ids)))
    for sizes in ([N], [1, 3]):
        engine = hold(model)
        with engine, engine.batch(range(N)) as batch:
            for part in ids.split(sizes):
                squares(model(part)).sum().backward()
        assert_held(batch.result, expected)


def test_what_a_checkpoint_does_otherwise_for_reasons_of_its_own_is_said_by_torch(
    hold: Hold,
) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.runs = nn.Linear(D, D), 0

        def inner(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.layer(x).tanh()[..., self.runs :].sin()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return out

    engine = hold(model := Changing(), verify=False)
    with engine, pytest.raises(CheckpointError, match="Recomputed"), engine.batch(range(N)):
        model(torch.randn(N, T, D)).sum().backward()


class Adapted(nn.Module):
    """Adds a product of weights to a weight, and calls one of the layers as well."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(D, D), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.down.weight @ self.base.weight
        return functional.linear(x, weight, self.base.bias) + self.down(x)


@pytest.mark.parametrize("verify", [False, True])
def test_what_a_checkpoint_runs_again_for_a_value_of_all_samples_is_exact(
    hold: Hold, assert_held: Callable[..., None], verify: bool
) -> None:
    """It runs for all samples at once, which a module's hooks do not allow, and then for each."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(D, D), Adapted(), nn.Linear(D, 2)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.block, self.first(x), use_reentrant=False))

    model, x = Model(), inputs()
    expected = per_sample_gradients(model, squares(model(x)))
    with hold(model, verify=verify) as engine:
        for _ in range(2):
            with engine.batch(range(N)) as batch:
                squares(model(x)).sum().backward()
            assert_held(batch.result, expected)
