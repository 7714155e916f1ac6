"""Wrappers for several processes: unwrapped, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from process_kit import group_of_one
from tests.processes.training import held_out, losses, net, samples
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ghost_core import CaptureError
from ghost_engines import DotProductEngine


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Be a process group of one."""
    with group_of_one():
        yield


@pytest.mark.parametrize(
    "options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str
)
def test_names_and_scores_are_those_of_the_model_inside(options: dict[str, bool]) -> None:
    """Closures may call the wrapper, whatever it keeps between calls."""
    plain, wrapped = net(), DistributedDataParallel(net(), **options)
    found = []
    for model in (plain, wrapped):
        engine = DotProductEngine(model)
        engine.add_direction("held out", lambda model=model: losses(model(held_out())).mean())
        engine.add_direction("ones", {n: torch.ones_like(p) for n, p in model.named_parameters()})
        with engine:
            for _ in range(3):
                with engine.batch(range(8)) as batch:
                    losses(model(samples()[:8])).mean().backward()
        assert engine.verify(lambda model=model: losses(model(samples()[:4]))).ok
        found.append(batch.result)
    assert list(found[0].by_parameter) == list(found[1].by_parameter)
    assert torch.equal(found[0].total, found[1].total)
    assert found[0].total.any()


class FullyShardedDataParallel(nn.Sequential):
    """Stands for torch's, which is known by its name."""


class DeepSpeedEngine(nn.Sequential):
    """Stands for DeepSpeed's, which is known by its name."""


@pytest.mark.parametrize("wrapper", [FullyShardedDataParallel, DeepSpeedEngine])
def test_wrappers_that_are_not_followed_are_refused(wrapper: type[nn.Sequential]) -> None:
    for model in (wrapper(net()), nn.Sequential(wrapper(net()))):
        with pytest.raises(CaptureError, match=f"is a {wrapper.__name__}") as caught:
            DotProductEngine(model)
        assert caught.value.remedy
