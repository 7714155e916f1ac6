"""Concatenated mode and the second order in two processes: other models, mistakes, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from tests.processes.sharded import Language, language, shard, texts
from tests.processes.training import (
    CURVED,
    JOINED,
    Case,
    held_out,
    losses,
    net,
    samples,
    train,
    whole,
)
from tests.processes.wrapped import dots, said_of, summed
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ghost_core import CaptureError
from ghost_core.ranks import Ranks
from ghost_engines import DotProductEngine, InRunValues, Scores, second_order
from ghost_engines.modes import Together

TRAIN = ([0, 1, 2, 3], [4, 5, 6])
HELD_OUT = ([0, 1], [2, 3, 4, 5])
"""Ids of each process."""

SCALE = 1024.0


def step(rank: int) -> dict[str, Tensor]:
    """Return the step that a process would make alone: another one in each."""
    generator = torch.Generator().manual_seed(rank)
    return {
        name: torch.randn(each.shape, generator=generator, dtype=torch.float64)
        for name, each in net().named_parameters()
    }


def others(rank: int) -> dict[str, Any]:
    """Return what is found of other models, with other options."""
    wrapped = DistributedDataParallel(net())
    engine = DotProductEngine(wrapped)
    engine.add_direction(
        "held out",
        lambda: losses(wrapped(held_out())).mean(),
        transform=second_order(partial(step, rank)),
    )
    with engine, engine.batch(TRAIN[rank]) as batch:
        losses(wrapped(samples()[TRAIN[rank]])).mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        half = _read(rank, language().float())
    return {
        "along a step": batch.result.total.flatten().tolist(),
        "tensors": _tensors(rank),
        "language": _read(rank, language()),
        "half": half,
        "scaled": _read(rank, language(), torch.amp.GradScaler("cpu", init_scale=SCALE)),
        "sharded": _read(rank, language(), shards=True),
        "sharded, fused": _read(rank, language(), shards=True, mode="fused"),
        "nobody": _nobody(rank),
        "gathered": _gathered(rank),
    }


def _tensors(rank: int) -> list[float]:
    """Score against tensors that a closure returns, others in each process."""
    model = shard(net())
    engine = dots(model, partial(step, rank))
    with engine, engine.batch(TRAIN[rank]) as batch:
        losses(model(samples()[TRAIN[rank]])).mean().backward()
    totals: list[float] = batch.result.total.flatten().tolist()
    return totals


def _read(
    rank: int,
    model: Language,
    scaler: torch.amp.GradScaler | None = None,
    *,
    shards: bool = False,
    mode: str = "concatenated",
) -> dict[str, Any]:
    """Return what is found of the second of two batches of texts."""
    if shards:
        for block in model.blocks:
            fully_shard(block)
    wrapped = fully_shard(model) if shards else DistributedDataParallel(model)
    engine = DotProductEngine(wrapped, mode=mode, norms=True, grad_scaler=scaler)
    train, validation = texts()[TRAIN[rank]], texts()[HELD_OUT[rank]]
    if mode != "concatenated":
        engine.add_direction("held out", lambda: losses(wrapped(validation)).mean())
    with engine:
        for _ in range(2):
            model.zero_grad()
            scores = _batch(rank, engine, wrapped, train, validation, mode=mode)
    return {
        "scores": scores.total.flatten().tolist(),
        "cosines": scores.cosines.flatten().tolist(),
        "gradient": [whole(each.grad).flatten().tolist() for each in model.parameters()],
    }


def _nobody(rank: int) -> list[float]:
    """Train on samples in the first process only; both have some of validation."""
    ids, wrapped = TRAIN[0] if not rank else [], DistributedDataParallel(net())
    engine = DotProductEngine(wrapped, mode="concatenated")
    with engine:
        for _ in range(2):
            given, targets = samples()[ids], held_out()[HELD_OUT[rank]]
            found = _batch(rank, engine, wrapped, given, targets, ids)
    totals: list[float] = found.total.flatten().tolist()
    return totals


def _gathered(rank: int) -> dict[str, Any]:
    """Gather values where the second process has no sample, and where it had no batch at all."""
    wrapped = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    engine = dots(wrapped, lambda: losses(wrapped(held_out())).mean())
    ids = [] if rank else TRAIN[0]
    with InRunValues(engine, optimizer) as values, engine:
        with engine.batch(ids):
            losses(wrapped(samples()[ids])).sum().backward()
        optimizer.step()
        fresh = InRunValues(engine, optimizer)
    tables = values.gathered(), (fresh if rank else values).gathered(distributed.group.WORLD)
    return {
        "own": values.to_dict(),
        "found": [
            dict(zip(each.ids.tolist(), each.values[:, 0].tolist(), strict=True)) for each in tables
        ],
        "counts": tables[0].counts.tolist(),
    }


def _batch(
    rank: int,
    engine: DotProductEngine,
    wrapped: nn.Module,
    train: Tensor,
    validation: Tensor,
    ids: list[int] | None = None,
    mode: str = "concatenated",
) -> Scores:
    if mode != "concatenated":
        with engine.batch(TRAIN[rank]) as batch:
            losses(wrapped(train)).mean().backward()
        return batch.result
    both = engine.concatenate(train, validation)
    with engine.batch(TRAIN[rank] if ids is None else ids) as batch:
        found = losses(wrapped(both))
        engine.backward(
            found, train_weight=1 / max(1, len(train)), validation_weight=1 / len(validation)
        )
    return batch.result


# Mistakes


def _mistaken(
    rank: int,
    *,
    ids: int | None = None,
    samples_of: int = 2,
    reduced: bool = False,
    times: int = 1,
    raises: bool = False,
    scale: float = 1.0,
) -> None:
    """Go through a batch, with a mistake in the second process."""
    wrapped = DistributedDataParallel(net())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale if rank else 1.0)
    engine = DotProductEngine(wrapped, mode="concatenated", grad_scaler=scaler)
    with engine:
        train, validation = samples()[TRAIN[rank]], held_out()[HELD_OUT[rank]]
        both = engine.concatenate(train, validation[: samples_of if rank else None])
        with engine.batch(range(len(train) if ids is None or not rank else ids)):
            outputs = wrapped(both)
            if raises and rank:
                outputs.register_hook(_fail)  # before the wrapper averages anything
            found = losses(outputs).mean() if reduced and rank else losses(outputs)
            for _ in range(times if rank else 1):
                engine.backward(found, train_weight=1.0, validation_weight=1.0)
            if not rank and times > 1:
                engine.concatenate(train, validation)


def _fail(_: Tensor) -> None:
    raise CaptureError("a hook of the user's failed")


APART = "do not go through this batch together"

MISTAKES: Mapping[str, tuple[Callable[[int], None], str, str]] = {
    "no samples": (partial(_mistaken, samples_of=0), APART, "the validation batch has no samples"),
    "other ids": (partial(_mistaken, ids=1), APART, "got 1 ids for 3 training samples"),
    "reduced losses": (partial(_mistaken, reduced=True), APART, "needs one loss for each"),
    "fails backwards": (partial(_mistaken, raises=True), APART, "a hook of the user's failed"),
    "other scales": (partial(_mistaken, scale=2.0), APART, APART),
    "twice": (partial(_mistaken, times=2), "call engine.concatenate() before", "goes once"),
}
"""What is done, and what is said of it in the first and in the second process."""


def refusals(rank: int) -> dict[str, str]:
    """Return what is said of each mistake."""
    return said_of(MISTAKES, lambda make: make(rank))


# Faults


def _summed(self: Together, tensor: Tensor) -> None:
    tensor *= self._ranks.count
    _AVERAGE(self, tensor)


_AVERAGE = Together._average


@contextmanager
def _own_step() -> Iterator[None]:
    """Forget to average products with the Hessian, and what they are taken along."""
    with patch.object(Ranks, "average", lambda _, tensors: dict(tensors)):
        yield


_TWICE, _OTHERS, _PARTS = (
    next(case for case in JOINED if case.name == f"joined, {name}")
    for name in ("a layer twice", "other layers", "parts")
)

FAULTS: Mapping[str, tuple[Case, Callable[[], Any]]] = {
    "forgets the average": (_PARTS, summed),
    "takes its own": (_PARTS, lambda: patch.object(Together, "_average", lambda *_: None)),
    "adds up": (_PARTS, lambda: patch.object(Together, "_average", _summed)),
    "leaves the rest": (_TWICE, lambda: patch.object(Together, "rest", lambda _, left: left)),
    "leaves others": (_OTHERS, lambda: patch.object(Together, "rest", lambda _, left: left)),
    "curves alone": (CURVED[0], _own_step),
    "curves with all": (CURVED[0], summed),
}
"""A run, and what goes wrong in it."""


def faulty(rank: int) -> dict[str, Any]:
    """Return what is found with each fault."""
    found = {}
    for name, (case, fault) in FAULTS.items():
        with fault():
            found[name] = train(case, rank, ghost=True)
    return found
