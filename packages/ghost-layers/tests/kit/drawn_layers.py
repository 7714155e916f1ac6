"""Layers of any shape and with any options, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from ghost_core.testing import LayerExample, N, normal

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=2000, derandomize=False)

SIZES = st.integers(1, 5)
TOKENS = st.lists(st.integers(1, 4), max_size=3)
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def integers(*shape: int, below: int) -> Callable[[int, Generator], Tensor]:
    def draw(n: int, generator: Generator) -> Tensor:
        sizes = [n if size == N else size for size in shape]
        return torch.randint(below, sizes, generator=generator)

    return draw


@st.composite
def linear(draw: st.DrawFn) -> LayerExample:
    width = draw(SIZES)
    make = partial(nn.Linear, width, draw(SIZES), bias=draw(st.booleans()))
    frozen = draw(st.sampled_from([(), ("weight",), ("bias",)]))
    assume(make().bias is not None or not frozen)
    inputs = (normal(N, *draw(TOKENS), width),)
    return LayerExample("linear", make, inputs, n=draw(SIZES), frozen=frozen)


@st.composite
def convolution(draw: st.DrawFn) -> LayerExample:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    per_axis = lambda values: draw(st.tuples(*[values] * rank))  # noqa: E731
    spatial, kernel = per_axis(st.integers(1, 6 if rank < 3 else 4)), per_axis(st.integers(1, 3))
    dilation, stride = per_axis(st.integers(1, 3)), per_axis(st.integers(1, 3))
    padding: Any = draw(st.sampled_from(["same", "valid", "sizes"]))
    if padding == "same":
        stride = (1,) * rank
    elif padding == "sizes":
        padding = per_axis(st.integers(0, 2))
    make = partial(
        CONVOLUTIONS[rank],
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    module = make()
    try:
        module(torch.zeros(1, module.in_channels, *spatial))
    except RuntimeError:
        assume(False)  # the kernel or its padding is larger than what there is
    inputs = (normal(N, module.in_channels, *spatial),)
    return LayerExample("convolution", make, inputs, n=draw(st.integers(1, 4)))


@st.composite
def embedding(draw: st.DrawFn) -> LayerExample:
    rows = draw(st.integers(1, 7))
    make = partial(
        nn.Embedding,
        rows,
        draw(SIZES),
        padding_idx=draw(st.none() | st.integers(-rows, rows - 1)),
        max_norm=draw(st.none() | st.sampled_from([0.1, 1.0])),
        norm_type=draw(st.sampled_from([1.0, 2.0, 3.0])),
        sparse=draw(st.booleans()),
    )
    inputs = (integers(N, *draw(TOKENS), below=rows),)
    return LayerExample("embedding", make, inputs, n=draw(SIZES))


@st.composite
def embedding_bag(draw: st.DrawFn) -> LayerExample:
    rows, entries = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    weighted = draw(st.booleans())
    make = partial(
        nn.EmbeddingBag,
        rows,
        draw(SIZES),
        mode="sum" if weighted else draw(st.sampled_from(["sum", "mean"])),
        padding_idx=draw(st.none() | st.integers(-rows, rows - 1)),
        max_norm=draw(st.none() | st.just(1.0)),
        include_last_offset=draw(st.booleans()),
    )
    inputs = (integers(N, entries, below=rows),)
    weights = {"per_sample_weights": normal(N, entries)} if weighted else {}
    return LayerExample("embedding bag", make, inputs, weights, n=draw(SIZES))


def layers() -> st.SearchStrategy[LayerExample]:
    """Return what draws a layer of any kind."""
    return linear() | convolution() | embedding() | embedding_bag()
