"""In-run values credit every batch whose gradients a step uses, whoever holds these gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from process_kit import group_of_one
from tests.foreign.foreign import assert_same
from tests.silent.compare import drawn, squares
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghost_core.testing import GradientHolder, per_sample_gradients
from ghost_engines import DotProductEngine, InRunValues

N, STEPS = 4, 2

AfterBackward = Callable[[nn.Module], None]


@pytest.fixture
def alone() -> Iterator[None]:
    """Be a process group of one."""
    with group_of_one():
        yield


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def values(model: nn.Module, after: AfterBackward | None = None) -> dict[int, float]:
    """Train for two steps of three micro-batches each, and return the values of all samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = DotProductEngine(model)
    # One direction that stays: what changes between runs is who keeps the gradients.
    direction = {name: torch.ones_like(each) for name, each in model.named_parameters()}
    engine.add_direction("ones", direction)
    in_run = InRunValues(engine, optimizer)
    with in_run, engine:
        for _ in range(STEPS):
            optimizer.zero_grad()
            for at in range(3):
                with engine.batch(range(at * N, at * N + N)):
                    squares(model(inputs()[at * N : at * N + N])).sum().backward()
                if after is not None:
                    after(model)
            optimizer.step()
    assert in_run.skipped_batches == 0
    return in_run.to_dict()


def inputs() -> Tensor:
    return drawn(3 * N, 3)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("as_view", [False, True])
def test_distributed_data_parallel(as_view: bool) -> None:
    wrapped = DistributedDataParallel(net(), gradient_as_bucket_view=as_view)
    assert values(wrapped) == values(net())


def _replace(model: nn.Module) -> None:
    """Put the same gradients into other tensors, as clipping and compression hooks do."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad.clone()


def test_gradients_replaced_between_batches() -> None:
    assert values(net(), _replace) == values(net())


def test_gradients_replaced_inside_batches() -> None:
    """A hook that runs when a gradient is there puts it into another tensor."""
    model = net()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_move)
    assert values(model) == values(net())


def _move(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad.clone()


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_before_a_batch_still_discards(to_none: bool) -> None:
    """What the fix must not lose: gradients thrown away without a step are credited to nobody."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = DotProductEngine(model)
    engine.add_direction("ones", {n: torch.ones_like(p) for n, p in model.named_parameters()})
    in_run = InRunValues(engine, optimizer)
    with in_run, engine:
        for at in range(2):
            optimizer.zero_grad(set_to_none=to_none)
            with engine.batch(range(at * N, at * N + N)):
                squares(model(inputs()[at * N : at * N + N])).sum().backward()
        optimizer.step()
    assert sorted(in_run.to_dict()) == list(range(N, 2 * N))
    assert in_run.skipped_batches == 1


def test_zero_grad_inside_a_batch_still_discards() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = DotProductEngine(model)
    engine.add_direction("ones", {n: torch.ones_like(p) for n, p in model.named_parameters()})
    in_run = InRunValues(engine, optimizer)
    with in_run, engine:
        for at in range(2):
            with engine.batch(range(at * N, at * N + N)):
                optimizer.zero_grad()
                squares(model(inputs()[at * N : at * N + N])).sum().backward()
        optimizer.step()
    assert sorted(in_run.to_dict()) == list(range(N, 2 * N))


def test_gradients_of_one_sample_are_not_what_later_passes_add_to() -> None:
    """Autograd keeps what arrives as `.grad`, and adds to it in place."""

    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.token = nn.Linear(3, 3), nn.Parameter(torch.randn(1, 1, 3))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            token = self.token.expand(len(x), 1, 3)
            return self.layer(torch.cat([token, x], 1))

    model, x = Token(), torch.randn(3, 2, 3, dtype=torch.float64)
    expected = per_sample_gradients(model, model(x).sin().sum((1, 2)))
    with GradientHolder(model) as engine:
        for _ in range(2):
            model.zero_grad()
            with engine.batch(range(3)) as batch:
                for part in x.split([1, 2]):
                    model(part).sin().sum().backward()
            assert_same(batch.result.materialize(), expected)
