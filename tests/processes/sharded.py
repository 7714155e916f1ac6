"""What else is done with a model under FSDP2: other engines, other models, mistakes, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tests.processes.training import FSDP, Net, held_out, losses, net, samples, train, whole
from tests.processes.wrapped import MINE, dots, said_of, summed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from ghost_engines import NormEngine, ProjectionEngine

WORDS, LENGTH, DIM = 11, 4, 8
RESHARDS = {"resharded": True, "sharded": False}
"""Whether parameters are in parts again after the forward pass of their module."""


class Language(nn.Module):
    """Looks up words and positions, the same for all samples; its head is tied to the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU()) for _ in range(2)]
        )
        self.head = nn.Linear(DIM, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean over positions, `[N, WORDS]`."""
        hidden = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
        for block in self.blocks:
            hidden = hidden + checkpoint(block, hidden, use_reentrant=False)
        return self.head(hidden.mean(1)) * 1.0


def language() -> Language:
    """Return the same model each time, in float64."""
    torch.manual_seed(4)
    return Language().double()


def texts() -> Tensor:
    """Return samples of words, `[8, LENGTH]`."""
    return torch.randint(0, WORDS, (8, LENGTH), generator=torch.Generator().manual_seed(5))


def direction(model: nn.Module) -> dict[str, Tensor]:
    """Return a direction by parameter name."""
    generator = torch.Generator().manual_seed(6)
    return {
        name: torch.randn(each.shape, generator=generator).double()
        for name, each in model.named_parameters()
    }


def others(rank: int) -> dict[str, Any]:
    """Return what other engines find in this process, and what is found of a language model."""
    return {
        **{name: _rows_and_norms(rank, reshards) for name, reshards in RESHARDS.items()},
        "language": _language(rank),
        "half": _half(rank),
        "half, fused": _half(rank, "fused"),
    }


def _rows_and_norms(rank: int, reshards: bool) -> dict[str, Any]:
    """Return those of the second of two passes: the first may have found whole parameters."""
    ids, model = MINE[rank], shard(net(), reshards)
    projection = ProjectionEngine(model, dim=4, min_dim=2)
    norms = NormEngine(model, loss_weights="sum")
    with projection, norms:
        for _ in range(2):
            with projection.batch(ids), norms.batch(ids):
                losses(model(samples()[ids])).sum().backward()
    return {
        "rows": projection.collect().rows.tolist(),
        "norms": norms.collect().total.tolist(),
    }


def _language(rank: int) -> list[float]:
    given, ids = direction(language()), MINE[rank]
    model = language()
    for block in model.blocks:
        fully_shard(block)
    engine = dots(fully_shard(model), given)
    with engine:
        for _ in range(2):
            with engine.batch(ids) as batch:
                losses(model(texts()[ids])).sum().backward()
    found: list[float] = batch.result.total.flatten().tolist()
    return found


def _half(rank: int, mode: str = "exact") -> list[float]:
    """Compute in bfloat16, and add up gradients in float32."""
    ids, model = MINE[rank], net().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    given = {name: each.float() for name, each in direction(model).items()}
    for name in ("trunk", "heads.0"):
        fully_shard(model.get_submodule(name), mp_policy=policy)
    engine = dots(fully_shard(model, mp_policy=policy), given, mode=mode)
    with engine:
        for _ in range(2):
            with engine.batch(ids) as batch:
                losses(model(samples()[ids].float()).float()).sum().backward()
    found: list[float] = batch.result.total.flatten().tolist()
    return found


def shard(model: Net, reshards: bool = True) -> Net:
    """Return a model whose parameters are in parts: see `Case.reshards`."""
    fully_shard(model.trunk, reshard_after_forward=reshards)
    return fully_shard(model, reshard_after_forward=reshards)


# Mistakes


def _loss(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: losses(model(held_out())).mean()


def _batch(model: nn.Module, rank: int, engine: Any) -> None:
    with engine, engine.batch(MINE[rank]):
        losses(model(samples()[MINE[rank]])).mean().backward()


def _frozen(rank: int) -> None:
    with ProjectionEngine(shard(net()), dim=4).frozen():
        pass


def _verified(rank: int) -> None:
    model = shard(net())
    dots(model, _loss(model)).verify(lambda: losses(model(samples()[MINE[rank]])))


def _candidates(rank: int) -> None:
    model = shard(net())
    engine = dots(model, _loss(model))
    with engine, engine.scoring():
        pass


def _unsynced(rank: int) -> None:
    model = shard(net())
    model.set_requires_gradient_sync(False)
    _batch(model, rank, dots(model, _loss(model)))


def _waiting(rank: int) -> None:
    model = shard(net())
    model.set_requires_gradient_sync(False)
    losses(model(samples()[MINE[rank]])).mean().backward()
    model.set_requires_gradient_sync(True)
    _batch(model, rank, dots(model, _loss(model)))


def _one_fails(rank: int) -> None:
    model = shard(net())
    wrong = lambda: losses(model(held_out())).mean() * (torch.inf if rank else 1)  # noqa: E731
    _batch(model, rank, dots(model, wrong))


def _nobody(rank: int) -> None:
    model = shard(net())
    engine = dots(model, _loss(model))
    with engine, engine.batch([]):
        losses(model(samples()[:0])).sum().backward()


def _in_part(rank: int) -> None:
    model = net()
    fully_shard(model.trunk)
    dots(model, _loss(model))


class Scaled(nn.Module):
    """Has a parameter and no formula."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return scaled inputs."""
        return inputs * self.scale.sin()


def _replayed(rank: int) -> None:
    model = fully_shard(nn.Sequential(Scaled(), nn.Linear(3, 1).double()))
    dots(model, _loss(model))


class Elsewhere(nn.Module):
    """Uses a weight outside of the layer that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs of both layers, and of one in another way."""
        return self.other(self.one(inputs) + inputs @ self.one.weight.tanh())


def _elsewhere(rank: int) -> None:
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(3, 3).double(), fully_shard(Elsewhere())))
    given = {name: torch.ones(each.shape) for name, each in model.named_parameters()}
    _batch(model, rank, dots(model, given))


def _tensor_parallel(rank: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    dots(model, lambda: model(torch.ones(2, 4)).sum())


MISTAKES = {
    "frozen": (_frozen, "frozen() is not for a model under fully_shard"),
    "verify": (_verified, "engine.verify is not for a model under fully_shard"),
    "candidates": (_candidates, "engine.scoring() is not for a model under fully_shard"),
    "not synchronised": (_unsynced, "gradients are not averaged in each backward pass"),
    "waiting gradients": (_waiting, "gradients are not averaged in each backward pass"),
    "one process fails": (_one_fails, "direction 'held out'"),
    "no samples": (_nobody, "a batch without samples is not for a model under fully_shard"),
    "sharded in part": (_in_part, "is not sharded"),
    "no formula": (_replayed, "is under fully_shard, and has no formula"),
    "used elsewhere": (_elsewhere, "do not add up to the gradient of 1.one.weight"),
    "tensor parallel": (_tensor_parallel, "as tensor parallelism makes"),
}


def refusals(rank: int) -> dict[str, str]:
    """Return what is said of each mistake."""
    return said_of(MISTAKES, lambda make: make(rank))


# Faults


@contextmanager
def _own_parts() -> Iterator[None]:
    """Look at the own part of gradients, which may be empty."""
    own = "ghost_engines.values.changes.prints_of_all"
    with patch(own, lambda _, *found: list(found)):
        yield


@contextmanager
def _averaged_twice() -> Iterator[None]:
    """Divide directions by the number of processes, which FSDP2 did."""
    with patch("ghost_engines.directions.closures.whole", lambda each: whole(each) / 2):
        yield


FAULTS: Mapping[str, Callable[[], Any]] = {
    "forgets the average": summed,
    "looks at its own part": _own_parts,
    "averages twice": _averaged_twice,
}


def faulty(rank: int) -> dict[str, Any]:
    """Return what is found with each fault."""
    found = {}
    for name, fault in FAULTS.items():
        with fault():
            found[name] = train(FSDP[1], rank, ghost=True)
    return found
