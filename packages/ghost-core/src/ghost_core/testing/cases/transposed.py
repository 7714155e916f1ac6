"""Transposed convolutions, bilinear maps and learned activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from ghost_core.testing.cases import roots
from ghost_core.testing.examples import LayerExample, N, named, normal

Example = partial(LayerExample, generic=True)

_KINDS: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SIZES = {1: (4,), 2: (3, 4), 3: (2, 3, 2)}
"""Positions of the input."""

# Channels in and out, size of the kernel, and options.
_OPTIONS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "": (3, 5, 3, {}),
    "no bias": (3, 5, 3, {"bias": False}),
    "stride": (3, 5, 3, {"stride": 2}),
    "stride and output padding": (3, 5, 3, {"stride": 2, "output_padding": 1}),
    "padding": (3, 5, 3, {"padding": 1}),
    "dilation": (3, 5, 2, {"dilation": 2}),
    "groups": (4, 6, 2, {"groups": 2}),
    "depthwise": (4, 4, 2, {"groups": 4}),
    "everything": (
        4,
        6,
        2,
        {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 3, "groups": 2, "bias": False},
    ),
}


def _transposed() -> Iterator[LayerExample]:
    for rank, kind in _KINDS.items():
        name = f"transposed conv{rank}d"
        for what, (inputs, outputs, kernel, options) in _OPTIONS.items():
            yield Example(
                f"{name}, {what}".removesuffix(", "),
                partial(kind, inputs, outputs, kernel, **options),
                (normal(N, inputs, *_SIZES[rank]),),
            )
    yield Example(
        "transposed conv1d, only the bias",
        lambda: nn.ConvTranspose1d(3, 5, 3),
        (normal(N, 3, 4),),
        frozen=("weight",),
    )
    yield Example(
        "transposed conv1d, used twice",
        lambda: roots.Repeated(nn.ConvTranspose1d(3, 3, 3, padding=1)),
        (normal(N, 3, 5),),
    )
    yield Example(
        "transposed conv2d, strides and output paddings",
        lambda: nn.ConvTranspose2d(3, 5, (2, 3), (3, 2), (0, 1), (1, 0)),
        (normal(N, 3, 2, 3),),
    )
    yield Example(
        "conv1d and transposed conv1d with one kernel",
        lambda: roots.Sharing(nn.Conv1d(3, 5, 3), nn.ConvTranspose1d(5, 3, 3), "weight"),
        (normal(N, 3, 6),),
    )


def _others() -> Iterator[LayerExample]:
    pair = (normal(N, 3), normal(N, 5))
    yield Example("bilinear", lambda: nn.Bilinear(3, 5, 2), pair)
    yield Example("bilinear, no bias", lambda: nn.Bilinear(3, 5, 2, bias=False), pair)
    yield Example(
        "bilinear, tokens", lambda: nn.Bilinear(3, 5, 2), (normal(N, 3, 3), normal(N, 3, 5))
    )
    yield Example("bilinear, only the bias", lambda: nn.Bilinear(3, 5, 2), pair, frozen=("weight",))
    yield Example("prelu", nn.PReLU, (normal(N, 6),))
    yield Example("prelu, tokens", nn.PReLU, (normal(N, 3, 6),))
    yield Example("prelu, a slope a channel", lambda: nn.PReLU(6), (normal(N, 6),))
    yield Example("prelu, a slope a channel, positions", lambda: nn.PReLU(6), (normal(N, 6, 5),))
    yield Example("prelu, two spatial axes", lambda: nn.PReLU(6), (normal(N, 6, 2, 3),))
    yield Example(
        "prelu, one slope in two places", lambda: roots.TwoNames(nn.PReLU()), (normal(N, 3, 6),)
    )


TRANSPOSED = named("transposed convolution", _transposed())
ACTIVATIONS = named("activation", _others())

TRANSPOSED_VARIANTS = named(
    "transposed convolution",
    [
        Example(
            f"transposed conv{rank}d, even kernel",
            partial(kind, 3, 5, 2),
            (normal(N, 3, *_SIZES[rank]),),
        )
        for rank, kind in _KINDS.items()
    ],
)
