"""Norms: over features, groups and instances, and over the batch with fixed statistics."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from ghost_core.testing.cases import roots
from ghost_core.testing.cases.roots import around, evaluated
from ghost_core.testing.examples import LayerExample as Example
from ghost_core.testing.examples import N, named, normal

_SPATIAL = {1: (5,), 2: (3, 2), 3: (2, 3, 2)}


def _before_linear(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.Linear(6, 7))


def _over_features() -> Iterator[Example]:
    for name, made in {"layer norm": nn.LayerNorm, "rms norm": nn.RMSNorm}.items():
        kind: Any = made
        yield Example(name, partial(kind, 6), (normal(N, 6),))
        yield Example(f"{name}, tokens", partial(kind, 6), (normal(N, 3, 6),))
        yield Example(f"{name}, as many tokens as samples", partial(kind, 6), (normal(N, N, 6),))
        yield Example(f"{name}, two axes of tokens", partial(kind, 6), (normal(N, 2, 3, 6),))
        yield Example(f"{name}, two axes", partial(kind, (3, 5)), (normal(N, 3, 5),))
        yield Example(f"{name}, two axes, tokens", partial(kind, (3, 5)), (normal(N, 2, 3, 5),))
        yield Example(f"{name}, three axes", partial(kind, (2, 3, 5)), (normal(N, 2, 3, 5),))
        yield Example(
            f"{name}, not contiguous",
            around(roots.Transposed, partial(kind, 6)),
            (normal(N, 6, 3),),
        )
        yield Example(
            f"{name}, used twice", around(roots.Repeated, partial(kind, 6)), (normal(N, 3, 6),)
        )
        yield Example(
            f"{name}, no affine",
            around(_before_linear, partial(kind, 6, elementwise_affine=False)),
            (normal(N, 3, 6),),
        )
    yield Example("rms norm, given epsilon", lambda: nn.RMSNorm(6, eps=0.1), (normal(N, 3, 6),))
    yield Example("rms norm, keyword", lambda: roots.Named(nn.RMSNorm(6), "x"), (normal(N, 6),))
    tokens = (normal(N, 3, 6),)
    yield Example("layer norm, no bias", lambda: nn.LayerNorm(6, bias=False), tokens)
    yield Example("layer norm, only the bias", lambda: nn.LayerNorm(6), tokens, frozen=("weight",))
    yield Example("layer norm, only the weight", lambda: nn.LayerNorm(6), tokens, frozen=("bias",))


def _over_groups() -> Iterator[Example]:
    for rank, sizes in {0: (), **_SPATIAL}.items():
        for what, groups in {"": 3, ", one group": 1, ", a group a channel": 6}.items():
            if not rank and groups == 6:
                continue  # every value is its own mean
            yield Example(
                f"group norm, {rank} spatial axes{what}",
                partial(nn.GroupNorm, groups, 6),
                (normal(N, 6, *sizes),),
            )
    positions = (normal(N, 6, 5),)
    yield Example(
        "group norm, as many positions as samples", lambda: nn.GroupNorm(3, 6), (normal(N, 6, N),)
    )
    yield Example(
        "group norm, only the weight", lambda: nn.GroupNorm(3, 6), positions, frozen=("bias",)
    )
    yield Example(
        "group norm, only the bias", lambda: nn.GroupNorm(3, 6), positions, frozen=("weight",)
    )
    yield Example(
        "group norm, no affine",
        lambda: nn.Sequential(nn.GroupNorm(2, 6, affine=False), nn.Conv1d(6, 5, 2)),
        positions,
    )
    yield Example("group norm, used twice", lambda: roots.Repeated(nn.GroupNorm(3, 6)), positions)


_INSTANCE: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BATCH: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _over_positions() -> Iterator[Example]:
    for rank, sizes in _SPATIAL.items():
        kind, inputs = _INSTANCE[rank], (normal(N, 6, *sizes),)
        name = f"instance norm {rank}d"
        yield Example(name, partial(kind, 6, affine=True), inputs)
        yield Example(
            f"{name}, running statistics in training",
            partial(kind, 6, affine=True, track_running_stats=True),
            inputs,
        )
        yield Example(
            f"{name}, running statistics in evaluation",
            around(evaluated, partial(kind, 6, affine=True, track_running_stats=True)),
            inputs,
        )
        kind, name = _BATCH[rank], f"batch norm {rank}d"
        yield Example(name, around(evaluated, partial(kind, 6)), inputs)
        yield Example(
            f"{name}, only the bias",
            around(evaluated, partial(kind, 6)),
            inputs,
            frozen=("weight",),
        )
    yield Example(
        "instance norm, as many positions as samples",
        lambda: nn.InstanceNorm1d(6, affine=True),
        (normal(N, 6, N),),
    )
    yield Example("batch norm, no positions", lambda: evaluated(nn.BatchNorm1d(6)), (normal(N, 6),))
    yield Example(
        "batch norm, only the weight",
        lambda: evaluated(nn.BatchNorm1d(6)),
        (normal(N, 6, 5),),
        frozen=("bias",),
    )
    yield Example(
        "batch norm, no affine, in evaluation",
        lambda: nn.Sequential(evaluated(nn.BatchNorm1d(6, affine=False)), nn.Conv1d(6, 5, 2)),
        (normal(N, 6, 5),),
    )
    yield Example(
        "batch norm, synchronised", lambda: evaluated(nn.SyncBatchNorm(6)), (normal(N, 6, 5),)
    )


NORMS = named("norm", [*_over_features(), *_over_groups(), *_over_positions()])

NORM_VARIANTS = named(
    "norm",
    [
        Example("layer norm, large epsilon", lambda: nn.LayerNorm(6, eps=0.5), (normal(N, 3, 6),)),
        Example("layer norm, many features", lambda: nn.LayerNorm(50), (normal(N, 3, 50),)),
        Example("group norm, two groups", lambda: nn.GroupNorm(2, 6), (normal(N, 6, 5),)),
    ],
)
