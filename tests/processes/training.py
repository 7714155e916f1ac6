"""What two processes train on, and the training itself: with DDP, with ghost or without."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ghost_engines import DotProductEngine, InRunValues, ScoreLog, Scores

RATE, CLIP = 0.2, 0.05
SAMPLES, HELD_OUT, WIDTH = 24, 6, 3

Parts = Sequence[Sequence[int]]
"""Sample ids of each process."""


@dataclass(frozen=True)
class Case:
    """A training run in two processes.

    Attributes:
        name: What it is about.
        steps: For each step its micro-batches, each with the ids of each process.
        options: Options of `DistributedDataParallel`.
        engine: Options of the engine.
        validation: The validation samples of each process.
        heads: The heads that each process uses, micro-batch by micro-batch; None for both.
        clips: Whether gradients are clipped before the step.
        again: Whether a layer is used twice.
        order: The order of values.
        sharded: What `fully_shard` is called on besides the model: names of modules; None for DDP.
        reshards: Whether parameters are whole only while their modules run.
    """

    name: str
    steps: Sequence[Sequence[Parts]]
    options: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    validation: Parts = (range(HELD_OUT), range(HELD_OUT))
    heads: Sequence[Sequence[int | None]] = ((None,), (None,))
    clips: bool = False
    again: bool = False
    order: Literal[1, 2] = 1
    sharded: Sequence[str] | None = None
    reshards: bool = True

    @property
    def joins(self) -> bool:
        """Whether validation samples go through the model with those of training."""
        return self.engine.get("mode") == "concatenated"

    def head(self, rank: int, at: int) -> int | None:
        """Return the head that a process uses in a micro-batch of a step."""
        heads = self.heads[rank]
        return heads[at % len(heads)]


_PLAIN: Parts = ([0, 1, 2, 3], [4, 5, 6, 7])
_NEXT: Parts = ([8, 9, 10, 11], [12, 13, 14, 15])
_UNEVEN: Parts = ([16, 17, 18], [19])
_HALVES: Parts = (range(3), range(3, 6))

DDP = [
    Case("plain", [[_PLAIN], [_NEXT]]),
    Case("uneven last batch", [[_PLAIN], [_UNEVEN]], validation=_HALVES),
    Case("a sample on both", [[_PLAIN], [([1, 8], [1, 9])]], validation=_HALVES),
    Case("accumulated", [[_PLAIN, _NEXT, _UNEVEN], [_PLAIN, _UNEVEN]], clips=True),
    Case(
        "bucket views",
        [[_PLAIN, _NEXT], [_UNEVEN], [_PLAIN]],
        {"gradient_as_bucket_view": True},
        validation=_HALVES,
        clips=True,
    ),
    Case("static graph", [[_PLAIN], [_NEXT], [_UNEVEN]], {"static_graph": True}, clips=True),
    Case(
        "unused parameters",
        [[_PLAIN, _NEXT], [_UNEVEN], [_PLAIN]],
        {"find_unused_parameters": True},
        heads=((0,), (1,)),
        clips=True,
    ),
    Case(
        "unused after it was used",
        [[_PLAIN, _NEXT], [_UNEVEN, _PLAIN]],
        {"find_unused_parameters": True},
        heads=((None, 0), (None, 1)),
        clips=True,
    ),
    Case("fused", [[_PLAIN, _NEXT], [_UNEVEN]], engine={"mode": "fused"}, validation=_HALVES),
]

_JOINED = {"mode": "concatenated", "norms": True}
_OTHER_SIZES: Parts = (range(2), range(2, 6))


def _in_buckets(name: str, steps: Sequence[Sequence[Parts]], option: str, **more: Any) -> Case:
    """Return a case of joined batches, with an option of DDP and a bucket for each parameter."""
    options = {option: True, "bucket_cap_mb": 1e-5}
    return Case(
        f"joined, {name}", steps, options, engine=_JOINED, validation=_HALVES, clips=True, **more
    )


JOINED = [
    Case("joined", [[_PLAIN], [_UNEVEN], [_NEXT]], engine=_JOINED),
    Case("joined, parts", [[_PLAIN], [_NEXT], [_UNEVEN]], engine=_JOINED, validation=_OTHER_SIZES),
    _in_buckets("accumulated", [[_PLAIN, _NEXT], [_UNEVEN, _PLAIN]], "gradient_as_bucket_view"),
    _in_buckets("static graph", [[_PLAIN], [_NEXT], [_UNEVEN]], "static_graph"),
    _in_buckets(
        "other layers",
        [[_PLAIN, _NEXT], [_UNEVEN], [_PLAIN]],
        "find_unused_parameters",
        heads=((0, None), (1, 0)),
    ),
    Case(
        "joined, a layer twice",
        [[_PLAIN, _NEXT], [_UNEVEN]],
        engine=_JOINED,
        validation=_HALVES,
        again=True,
    ),
]
"""Validation samples that go through the model with those of training."""

CURVED = [
    Case("curved", [[_PLAIN], [_UNEVEN], [_NEXT]], validation=_HALVES, order=2),
    Case("curved, fused", [[_PLAIN]], engine={"mode": "fused"}, validation=_HALVES, order=2),
    Case("curved, accumulated", [[_PLAIN, _NEXT], [_UNEVEN]], clips=True, order=2),
    Case(
        "curved, other layers",
        [[_PLAIN, _NEXT], [_UNEVEN]],
        {"find_unused_parameters": True},
        heads=((0,), (1,)),
        clips=True,
        order=2,
    ),
]
"""Values of the second order."""


FSDP = [
    Case(f"{name}, {'re' * reshards}sharded", steps, validation=_HALVES, clips=True,
         sharded=sharded, reshards=reshards)
    for reshards in (True, False)
    for name, steps, sharded in (
        ("root", [[_PLAIN], [_UNEVEN], [_NEXT]], []),
        ("blocks", [[_PLAIN, _NEXT], [_UNEVEN, _PLAIN]], ["trunk", "heads.1"]),
        ("layers", [[_PLAIN, _NEXT], [_UNEVEN]], ["trunk.0", "trunk.2", "heads.0", "heads.1"]),
    )
]  # fmt: skip

_BLOCKS = ["trunk", "heads.1"]

MADE = [
    Case("fused, sharded", [[_PLAIN, _NEXT], [_UNEVEN]], engine={"mode": "fused", "norms": True},
         validation=_HALVES, clips=True, sharded=_BLOCKS),
    Case("fused, layers", [[_PLAIN], [_UNEVEN]], engine={"mode": "fused"}, validation=_HALVES,
         sharded=["trunk.0", "trunk.2", "heads.0"], again=True, reshards=False),
    Case("joined, sharded", [[_PLAIN, _NEXT], [_UNEVEN], [_PLAIN]], engine=_JOINED,
         validation=_OTHER_SIZES, clips=True, sharded=_BLOCKS),
    Case("joined, layers", [[_PLAIN], [_UNEVEN]], engine=_JOINED, validation=_HALVES,
         sharded=["trunk.0", "trunk.2", "heads.0"], again=True, reshards=False),
    Case("joined, a head", [[_PLAIN, _NEXT], [_UNEVEN]], engine=_JOINED, validation=_HALVES,
         heads=((0, None), (0, None)), sharded=["trunk"]),
    Case("curved, sharded", [[_PLAIN, _NEXT], [_UNEVEN], [_PLAIN]], validation=_HALVES,
         clips=True, sharded=_BLOCKS, order=2),
    Case("curved, layers", [[_PLAIN], [_UNEVEN]], engine={"mode": "fused"}, validation=_HALVES,
         sharded=["trunk.0", "trunk.2", "heads.0"], again=True, reshards=False, order=2),
]  # fmt: skip
"""Gradients that ghost makes, and the second order, where parameters are in parts."""


class Net(nn.Module):
    """A net with two heads and a buffer that every call in training mode writes to."""

    calls: Tensor

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.LayerNorm(5))
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)])
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor, head: int | None = None) -> Tensor:
        """Return the outputs of one head, or the sum of both, `[N, 1]`."""
        if self.training:
            self.calls += 1
        inner = self.trunk(inputs)
        if self.again:
            inner = self.trunk[2](inner.sin())
        chosen = self.heads if head is None else [self.heads[head]]
        return torch.stack([each(inner) for each in chosen], 1).sum(1)


def net(again: bool = False) -> Net:
    """Return the same net each time, in float64."""
    torch.manual_seed(3)
    return Net(again).double()


def samples() -> Tensor:
    """Return all training samples, `[SAMPLES, WIDTH]`."""
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def held_out() -> Tensor:
    """Return all validation samples, `[HELD_OUT, WIDTH]`."""
    return torch.randn(HELD_OUT, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def losses(outputs: Tensor) -> Tensor:
    """Return the loss of each sample, `[N]`."""
    return (outputs - 1).square().sum(1)


def wrap(case: Case, model: nn.Module) -> nn.Module:
    """Return a model as the processes train it."""
    if case.sharded is None:
        return DistributedDataParallel(model, **case.options)
    for name in case.sharded:
        fully_shard(model.get_submodule(name), reshard_after_forward=case.reshards)
    return fully_shard(model, reshard_after_forward=case.reshards)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be in parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(
    case: Case, rank: int, *, ghost: bool, how: str = "wrapper", log: Path | None = None
) -> dict[str, Any]:
    """Train in one of the processes.

    Args:
        case: The run.
        rank: Which process it is.
        ghost: Whether ghost is there.
        how: How the validation loss is computed: by the wrapper, or by the model inside.
        log: Where to log steps, if anywhere.

    Returns:
        Parameters, and what ghost says: scores by step and sample, values by sample, of this
        process and of both.
    """
    model = net(case.again)
    wrapped = wrap(case, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    inputs = samples()
    target = held_out()[list(case.validation[rank])]
    asked = wrapped if how == "wrapper" else model
    scores: list[dict[int, float]] = []
    cosines: list[list[float]] = []
    with ExitStack() as stack:
        if ghost:
            engine = DotProductEngine(wrapped, **case.engine)
            if not case.joins:
                engine.add_direction("held out", lambda: losses(asked(target)).mean())
            values = stack.enter_context(InRunValues(engine, optimizer, order=case.order))
            stack.enter_context(engine)
            if log is not None:
                values.on_credit(stack.enter_context(ScoreLog.create(log)).append)
        for step in case.steps:
            optimizer.zero_grad()
            for at, parts in enumerate(step):
                part, head, last = list(parts[rank]), case.head(rank, at), at == len(step) - 1
                synced = nullcontext()
                if not last and isinstance(wrapped, DistributedDataParallel):
                    synced = wrapped.no_sync()
                given = inputs[part]
                if ghost and case.joins:
                    given = engine.concatenate(given, target)
                with synced, engine.batch(part) if ghost else nullcontext() as batch:
                    found = losses(wrapped(given, head))
                    if ghost and case.joins:
                        weights = {"train_weight": 1 / len(part)}
                        engine.backward(found, **weights, validation_weight=1 / len(target))
                    else:
                        found.mean().backward()
                if ghost:
                    total = batch.result.total.flatten().tolist()
                    scores.append(dict(zip(part, total, strict=True)))
                    cosines.append(_cosines(batch.result))
            if case.clips:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    state = {name: whole(each).tolist() for name, each in model.state_dict().items()}
    if not ghost:
        return {"state": state}
    table, gathered = values.table(), values.gathered()
    return {
        "state": state,
        "scores": scores,
        "cosines": cosines,
        "values": dict(zip(table.ids.tolist(), table.values[:, 0].tolist(), strict=True)),
        "gathered": dict(zip(gathered.ids.tolist(), gathered.values[:, 0].tolist(), strict=True)),
        "steps": gathered.by_step[:, 0].tolist(),
        "seen": dict(zip(table.ids.tolist(), table.counts.tolist(), strict=True)),
    }


def _cosines(scores: Scores) -> list[float]:
    """Return the cosines of a batch, if norms were taken."""
    return [] if scores.squared_norms is None else scores.cosines.flatten().tolist()
