"""What else is done with a model under DDP: other engines, mistakes, and faults put into ghost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tests.processes.training import DDP, Case, held_out, losses, net, samples, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghost_core import GhostError
from ghost_core.ranks import Ranks
from ghost_engines import DotProductEngine, InRunValues, NormEngine, ProjectionEngine
from ghost_engines.scoring import ScoringEngine
from ghost_engines.values import CreditedStep

MINE = ([0, 1, 2, 3], [4, 5, 6])
"""Ids of each process."""


def others(rank: int) -> dict[str, Any]:
    """Return what other engines find in this process, twice each, and a step after all of them."""
    ids = MINE[rank]
    model = net()
    wrapped = DistributedDataParallel(model)
    projection, norms = (
        ProjectionEngine(wrapped, dim=4, min_dim=2),
        NormEngine(wrapped, loss_weights="sum"),
    )
    rows, squared = [], []
    for _ in range(2):
        with projection.frozen(), projection.batch(ids):
            losses(wrapped(samples()[ids])).sum().backward()
        rows.append(projection.collect().rows.tolist())
        with norms, norms.batch(ids):
            losses(wrapped(samples()[ids])).sum().backward()
        squared.append(norms.collect().total.tolist())
        model.zero_grad()
    engine = dots(wrapped, lambda: losses(wrapped(held_out())).mean())
    chosen = []
    with engine:
        for _ in range(2):
            with engine.scoring():
                found = engine.score(lambda: losses(wrapped(samples()[ids])), ids)
            chosen.append(found.total.flatten().tolist())
            checked = engine.verify(lambda: losses(wrapped(samples()[ids]))).ok
    losses(wrapped(samples()[ids])).mean().backward()
    return {
        "rows": rows,
        "norms": squared,
        "candidates": chosen,
        "verified": checked,
        "gradient": [each.grad.tolist() for each in model.parameters() if each.grad is not None],
    }


def dots(model: nn.Module, direction: Any, **options: Any) -> DotProductEngine:
    """Return an engine with one direction."""
    engine = DotProductEngine(model, **options)
    engine.add_direction("held out", direction)
    return engine


# Mistakes


def _batch(wrapped: nn.Module, engine: DotProductEngine, rank: int) -> None:
    with engine, engine.batch(MINE[rank]):
        losses(wrapped(samples()[MINE[rank]])).mean().backward()


def _loss(wrapped: nn.Module) -> Callable[[], Tensor]:
    return lambda: losses(wrapped(held_out())).mean()


def _inner(wrapped: DistributedDataParallel, rank: int) -> None:
    _batch(wrapped, dots(wrapped.module, _loss(wrapped.module)), rank)


def _inner_called(wrapped: DistributedDataParallel, rank: int) -> None:
    _batch(wrapped.module, dots(wrapped, _loss(wrapped)), rank)


def _one_fails(wrapped: nn.Module, rank: int) -> None:
    wrong = lambda: losses(wrapped(held_out())).mean() * (torch.inf if rank else 1)  # noqa: E731
    _batch(wrapped, dots(wrapped, wrong), rank)


def _other_names(wrapped: nn.Module, rank: int) -> None:
    engine = DotProductEngine(wrapped)
    engine.add_direction(f"held out {rank}", _loss(wrapped))
    _batch(wrapped, engine, rank)


def _other_tensors(wrapped: nn.Module, rank: int) -> None:
    given = {name: torch.full_like(each, rank) for name, each in wrapped.named_parameters()}
    _batch(wrapped, dots(wrapped, given), rank)


def _joining(wrapped: DistributedDataParallel, rank: int) -> None:
    with wrapped.join():
        _batch(wrapped, dots(wrapped, _loss(wrapped)), rank)


def _normalised(wrapped: nn.Module, rank: int) -> None:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    InRunValues(dots(wrapped, _loss(wrapped)), optimizer).table(normalised=True)


def _inside_another(wrapped: nn.Module, rank: int) -> None:
    DotProductEngine(nn.Sequential(wrapped))


MISTAKES = {
    "the model inside": (_inner, "give the engine the wrapper"),
    "the model inside called": (_inner_called, "call the wrapper, ddp(batch)"),
    "one process fails": (_one_fails, "direction 'held out'"),
    "other directions": (_other_names, "is not the same in all processes"),
    "other tensors": (_other_tensors, "is not the same in all processes"),
    "join": (_joining, "inside DistributedDataParallel's join()"),
    "normalised": (_normalised, "values cannot be normalised"),
    "wrapped in part": (_inside_another, "it wraps a part of the model only"),
}


def refusals(rank: int) -> dict[str, str]:
    """Return what is said of each mistake."""
    return said_of(MISTAKES, lambda make: make(DistributedDataParallel(net()), rank))


def said_of(
    mistakes: Mapping[str, tuple[Any, ...]],
    make: Callable[[Callable[..., Any]], object],
) -> dict[str, str]:
    """Make mistakes, and return what is said of those that are refused."""
    said = {}
    for name, (mistake, *_) in mistakes.items():
        try:
            make(mistake)
        except GhostError as error:
            said[name] = str(error)
    return said


# Faults


@contextmanager
def summed() -> Iterator[None]:
    """Forget that gradients are averaged over processes."""
    with patch.object(ScoringEngine, "scale", property(lambda self: self.loss_scale)):
        yield


@contextmanager
def _own_directions() -> Iterator[None]:
    """Forget to average directions."""
    with patch.object(Ranks, "average", lambda _, tensors: dict(tensors)):
        yield


@contextmanager
def _last_dropped() -> Iterator[None]:
    """Drop a last batch that is smaller than those before."""
    credit = InRunValues._credit
    sizes: list[int] = []

    def dropping(self: InRunValues, credited: CreditedStep) -> None:
        sizes.append(len(credited.ids))
        if len(credited.ids) == max(sizes):
            credit(self, credited)

    with patch.object(InRunValues, "_credit", dropping):
        yield


FAULTS: Mapping[str, Callable[[], Any]] = {
    "forgets the average": summed,
    "forgets to average directions": _own_directions,
    "drops the last batch": _last_dropped,
}

UNEVEN: Case = next(case for case in DDP if case.name == "uneven last batch")


def faulty(rank: int) -> dict[str, Any]:
    """Return what is found with each fault."""
    found = {}
    for name, fault in FAULTS.items():
        with fault():
            found[name] = train(UNEVEN, rank, ghost=True)
    return found
