"""Tables of embeddings and bags of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ghost_core.testing.cases import roots
from ghost_core.testing.examples import VOCABULARY, N, indices, named, normal
from ghost_core.testing.examples import LayerExample as Example


class _Renamed(nn.Embedding):
    """Another name for the same."""


def _table(**options: Any) -> nn.Embedding:
    return nn.Embedding(VOCABULARY, 5, **options)


def _bag(mode: str = "sum", **options: Any) -> nn.EmbeddingBag:
    return nn.EmbeddingBag(VOCABULARY, 5, mode=mode, **options)


_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "padding": {"padding_idx": 2},
    "sparse": {"sparse": True},
    "sparse, padding": {"sparse": True, "padding_idx": 2},
    "max_norm": {"max_norm": 1.0},
    "max_norm, another norm": {"max_norm": 1.5, "norm_type": 1.0},
    "max_norm, largest entry": {"max_norm": 0.5, "norm_type": float("inf")},
    "max_norm, padding": {"max_norm": 1.0, "padding_idx": 2},
}

_SHAPES = {
    "one index": (N,),
    "two axes of tokens": (N, 3, 2),
    "three axes of tokens": (N, 2, 3, 2),
    "as many tokens as samples": (N, N),
}


def _padded_later(table: nn.Embedding | nn.EmbeddingBag) -> nn.Module:
    """Set a padding index that counts from the end, which only the constructor turns around."""
    table.padding_idx = -1
    return table


def _bags_of_padding(n: int, generator: Generator) -> Tensor:
    """Draw `[N, 6]`, whose first bag has nothing but padding in it."""
    drawn: Tensor = indices(N, 6)(n, generator)
    drawn[0] = 2
    return drawn


def _offsets(n: int) -> Tensor:
    """Return where n bags begin among 9 entries, the second empty, and where the last one ends."""
    starts = torch.arange(n + 1).clamp(max=8)
    starts[1:3] = 2
    starts[0], starts[-1] = 0, 9
    return starts


def _embeddings() -> Iterator[Example]:
    for name, options in _OPTIONS.items():
        yield Example(
            f"embedding, {name}".removesuffix(", "),
            partial(_table, **options),
            (indices(N, 9),),
        )
    for name, shape in _SHAPES.items():
        yield Example(f"embedding, {name}", _table, (indices(*shape),))
        yield Example(
            f"embedding, {name}, padding", lambda: _table(padding_idx=2), (indices(*shape),)
        )
    yield Example("embedding, int32", _table, (indices(N, 9, dtype=torch.int32),))
    yield Example("embedding, keyword", lambda: roots.Named(_table()), (indices(N, 9),))
    yield Example("embedding, subclass", lambda: _Renamed(VOCABULARY, 5), (indices(N, 9),))
    yield Example(
        "embedding, not contiguous", lambda: roots.Transposed(_table()), (indices(N, 3, 4),)
    )
    yield Example("embedding, changed in place", lambda: roots.InPlace(_table()), (indices(N, 9),))
    yield Example(
        "embedding, used on two views", lambda: roots.TwoViews(_table()), (indices(N, 9),)
    )
    yield Example("embedding, recomputed", lambda: roots.Checkpointed(_table()), (indices(N, 9),))
    yield Example(
        "embedding, behind its positions",
        lambda: nn.Sequential(_table(), nn.Dropout(0.5), nn.Linear(5, 6)),
        (indices(N, 9),),
    )


def _bags() -> Iterator[Example]:
    for mode in ("sum", "mean"):
        for name, options in _OPTIONS.items():
            if "another" in name or "largest" in name:
                continue
            yield Example(
                f"embedding bag, {mode}, {name}".removesuffix(", "),
                partial(_bag, mode, **options),
                (indices(N, 6),),
            )
    for name, options in {"": {}, "padding": {"padding_idx": 2}}.items():
        yield Example(
            f"embedding bag, max, {name}".removesuffix(", "),
            partial(_bag, "max", **options),
            (indices(N, 6),),
        )
    joined = (indices(9), lambda n, generator: _offsets(n)[:-1])
    yield Example("embedding bag, offsets", _bag, joined)
    yield Example(
        "embedding bag, offsets, mean, padding", lambda: _bag("mean", padding_idx=2), joined
    )
    yield Example(
        "embedding bag, offsets, max, the last one",
        lambda: _bag("max", include_last_offset=True),
        (indices(9), lambda n, generator: _offsets(n)),
    )
    yield Example(
        "embedding bag, offsets, weights",
        _bag,
        (*joined, normal(9)),
    )
    weights = {"per_sample_weights": normal(N, 6)}
    yield Example("embedding bag, weights", _bag, (indices(N, 6),), weights)
    yield Example(
        "embedding bag, weights, padding", lambda: _bag(padding_idx=2), (indices(N, 6),), weights
    )
    yield Example(
        "embedding bag, weights by position",
        _bag,
        (indices(N, 6), lambda n, generator: None, normal(N, 6)),
    )
    yield Example("embedding bag, as many entries as samples", _bag, (indices(N, N),))
    yield Example(
        "embedding bag, mean, as many entries as samples", lambda: _bag("mean"), (indices(N, N),)
    )
    yield Example("embedding bag, int32", _bag, (indices(N, 6, dtype=torch.int32),))
    yield Example(
        "embedding bag, include_last_offset",
        lambda: _bag(include_last_offset=True),
        (indices(N, 6),),
    )


TABLES = named("table", [*_embeddings(), *_bags()])

TABLE_VARIANTS = named(
    "table",
    [
        Example(
            "embedding, square", lambda: nn.Embedding(VOCABULARY, VOCABULARY), (indices(N, 9),)
        ),
        Example(
            "embedding tied to a head, square",
            lambda: roots.Tied(width=VOCABULARY),
            (indices(N, 6),),
        ),
        Example(
            "embedding, padding from the end", lambda: _table(padding_idx=-1), (indices(N, 9),)
        ),
        Example("embedding, first row as padding", lambda: _table(padding_idx=0), (indices(N, 9),)),
        Example("embedding, padding set later", lambda: _padded_later(_table()), (indices(N, 9),)),
        Example(
            "embedding bag, padding set later",
            lambda: _padded_later(_bag("mean")),
            (indices(N, 6),),
        ),
        Example(
            "embedding, pretrained",
            lambda: nn.Embedding.from_pretrained(torch.ones(VOCABULARY, 5), freeze=False),
            (indices(N, 9),),
        ),
        Example(
            "embedding bag, padding from the end",
            lambda: _bag("mean", padding_idx=-1),
            (indices(N, 6),),
        ),
        Example(
            "embedding bag, nothing but padding",
            lambda: _bag("mean", padding_idx=2),
            (_bags_of_padding,),
        ),
        Example(
            "embedding, one row",
            lambda: nn.Embedding(1, 5),
            (lambda n, _: torch.zeros(n, 3).long(),),
        ),
    ],
)
