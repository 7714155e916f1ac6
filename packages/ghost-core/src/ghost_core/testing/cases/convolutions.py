"""Convolutions along one, two and three axes: every way in which a kernel moves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ghost_core.testing.cases import roots
from ghost_core.testing.cases.roots import around
from ghost_core.testing.examples import LayerExample as Example
from ghost_core.testing.examples import N, named, normal

_KINDS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MEMORY_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
_SIZES = {1: (7,), 2: (5, 6), 3: (3, 4, 3)}
"""Positions of the input."""

# Channels in and out, size of the kernel, and options, each for every number of axes.
_SAME_FOR_ALL: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "": (3, 5, 3, {}),
    "no bias": (3, 5, 3, {"bias": False}),
    "kernel of one": (3, 5, 1, {}),
    "kernel of one, stride": (3, 5, 1, {"stride": 2}),
    "stride": (3, 5, 3, {"stride": 2}),
    "stride beyond the kernel": (3, 5, 2, {"stride": 3}),
    "padding": (3, 5, 3, {"padding": 1}),
    "stride and padding, no bias": (3, 5, 3, {"stride": 2, "padding": 1, "bias": False}),
    "valid": (3, 5, 3, {"padding": "valid"}),
    "same": (3, 5, 3, {"padding": "same"}),
    "same, even kernel": (3, 5, 2, {"padding": "same"}),
    "same, even kernel, dilation": (3, 5, 2, {"padding": "same", "dilation": 3}),
    "dilation": (3, 5, 2, {"dilation": 2}),
    "stride, padding and dilation": (3, 5, 3, {"stride": 2, "padding": 2, "dilation": 2}),
    "reflect": (3, 5, 3, {"padding": 1, "padding_mode": "reflect"}),
    "replicate": (3, 5, 3, {"padding": 1, "padding_mode": "replicate"}),
    "circular": (3, 5, 3, {"padding": 1, "padding_mode": "circular"}),
    "same and circular, even kernel": (3, 5, 2, {"padding": "same", "padding_mode": "circular"}),
    "reflect, stride": (3, 5, 3, {"padding": 1, "padding_mode": "reflect", "stride": 2}),
    "groups": (4, 6, 3, {"groups": 2}),
    "groups, stride, no bias": (4, 6, 2, {"groups": 2, "stride": 2, "bias": False}),
    "depthwise": (4, 4, 3, {"groups": 4}),
    "depthwise, same, no bias": (4, 4, 3, {"groups": 4, "padding": "same", "bias": False}),
    "depthwise with a multiplier": (3, 6, 2, {"groups": 3, "dilation": 2}),
}

# Options that differ from axis to axis: the kernel, then its options.
_BY_AXIS: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "conv2d, along one axis": (3, 5, (1, 3), {}),
    "conv2d, strides": (3, 5, 3, {"stride": (2, 1)}),
    "conv2d, paddings": (3, 5, 3, {"padding": (2, 0)}),
    "conv2d, same, even and odd kernel": (3, 5, (4, 3), {"padding": "same"}),
    "conv2d, reflect, one axis": (3, 5, 3, {"padding": (0, 2), "padding_mode": "reflect"}),
    "conv2d, everything": (
        4,
        6,
        (3, 2),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3), "groups": 2},
    ),
    "conv3d, kernels": (2, 4, (1, 2, 3), {}),
    "conv3d, same, even and odd kernel": (2, 4, (2, 3, 1), {"padding": "same"}),
    "conv3d, replicate, two axes": (
        2,
        4,
        2,
        {"padding": (1, 0, 2), "padding_mode": "replicate"},
    ),
    "conv3d, everything": (
        4,
        4,
        (2, 3, 2),
        {"stride": (1, 2, 1), "padding": (1, 2, 0), "dilation": (2, 1, 2), "groups": 2},
    ),
}


def _example(
    name: str, rank: int, inputs: int, outputs: int, kernel: Any, options: dict[str, Any]
) -> Example:
    kind: Any = _KINDS[rank]
    return Example(
        name, partial(kind, inputs, outputs, kernel, **options), (normal(N, inputs, *_SIZES[rank]),)
    )


def _plain() -> Iterator[Example]:
    for rank in _KINDS:
        for name, arguments in _SAME_FOR_ALL.items():
            yield _example(f"conv{rank}d, {name}".removesuffix(", "), rank, *arguments)
    for name, arguments in _BY_AXIS.items():
        yield _example(name, int(name[4]), *arguments)


def _around() -> Iterator[Example]:
    """Convolutions that are frozen in part, repeated, reused and laid out in another way."""
    for rank, made in _KINDS.items():
        kind: Any = made
        name, sizes = f"conv{rank}d", _SIZES[rank]
        inputs, ones = (normal(N, 3, *sizes),), (1,) * (rank - 1)
        yield Example(f"{name}, only the weight", partial(kind, 3, 5, 3), inputs, frozen=("bias",))
        yield Example(f"{name}, only the bias", partial(kind, 3, 5, 3), inputs, frozen=("weight",))
        yield Example(
            f"{name}, as many positions as samples",
            partial(kind, 3, 5, 3, padding=1),
            (normal(N, 3, N, *ones),),
        )
        yield Example(
            f"{name}, used twice",
            around(roots.Repeated, partial(kind, 3, 3, 3, padding=1)),
            inputs,
        )
        if rank > 1:
            layout = _MEMORY_FORMATS[rank]
            for what, options in {
                "": {},
                ", groups and stride": {"groups": 2, "stride": 2},
            }.items():
                yield Example(
                    f"{name}, channels last{what}",
                    around(roots.ChannelsLast, partial(kind, 4, 6, 2, **options), layout),
                    (normal(N, 4, *sizes),),
                )


CONVOLUTIONS = named("convolution", [*_plain(), *_around()])

CONVOLUTION_VARIANTS = named(
    "convolution",
    [
        Example("conv1d, many positions", lambda: nn.Conv1d(2, 7, 3), (normal(N, 2, 50),), n=3),
        Example("conv1d, larger kernel", lambda: nn.Conv1d(3, 5, 5), (normal(N, 3, 7),)),
        _example("conv1d, even kernel", 1, 3, 5, 2, {}),
        _example("conv1d, padding, even kernel", 1, 3, 5, 2, {"padding": 1}),
        _example("conv2d, even and odd kernel", 2, 3, 5, (2, 3), {}),
        _example("conv2d, dilations", 2, 3, 5, (2, 3), {"dilation": (3, 2)}),
        _example("conv3d, even kernel", 3, 3, 5, 2, {}),
        Example("conv2d, one position", lambda: nn.Conv2d(2, 9, 3), (normal(N, 2, 3, 3),)),
        Example("conv2d, one sample", lambda: nn.Conv2d(2, 5, 3), (normal(N, 2, 5, 6),), n=1),
    ],
)
