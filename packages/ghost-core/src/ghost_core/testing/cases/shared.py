"""Parameters with several uses or names, and ways to call layers and to use what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from ghost_core.testing.cases import roots
from ghost_core.testing.examples import VOCABULARY, Draw, N, indices, named, normal
from ghost_core.testing.examples import LayerExample as Example

_TOKENS = (normal(N, 3, 6),)


def _square(bias: bool = True) -> nn.Linear:
    return nn.Linear(6, 6, bias=bias)


def _grouped() -> list[nn.Module]:
    """Make convolutions that see one kernel as that of one and of several groups."""
    whole, grouped = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, groups=4)
    shared = nn.Conv1d(4, 4, 3, groups=4, dilation=2, padding=1)
    shared.weight = grouped.weight
    return [whole, grouped, shared]


class Outside(roots.Around):
    """Uses a layer's weight outside of it."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer, and multiply by its weight once more."""
        return functional.linear(self.inner(inputs), self.inner.get_parameter("weight").mT)


class SharedRow(roots.Around):
    """Multiplies a matrix that is computed once for all samples."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.row = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        return self.inner(inputs @ self.row(torch.eye(6, dtype=inputs.dtype)[None]))


SHARED = named(
    "shared",
    [
        Example("linear, used twice", lambda: roots.Repeated(_square()), (normal(N, 6),)),
        Example("weight used outside", lambda: Outside(_square()), _TOKENS),
        Example("one row multiplied", lambda: SharedRow(_square()), _TOKENS),
        Example("linear, tokens, used twice", lambda: roots.Repeated(_square()), _TOKENS),
        Example(
            "linear, tokens, used twice, no bias", lambda: roots.Repeated(_square(False)), _TOKENS
        ),
        Example("linear, used three times", lambda: roots.Repeated(_square(), 3), _TOKENS),
        Example(
            "linear, used twice, as many tokens as samples",
            lambda: roots.Repeated(_square()),
            (normal(N, N, 6),),
        ),
        Example(
            "linear, used twice, only the bias",
            lambda: roots.Repeated(_square()),
            _TOKENS,
            frozen=("inner.weight",),
        ),
        Example(
            "linear, on two views", lambda: roots.TwoViews(nn.Linear(6, 7)), (normal(N, 4, 6),)
        ),
        Example("linear, two names", lambda: roots.TwoNames(_square()), _TOKENS),
        Example("layer norm, two names", lambda: roots.TwoNames(nn.LayerNorm(6)), _TOKENS),
        Example(
            "conv1d, two names",
            lambda: roots.TwoNames(nn.Conv1d(6, 6, 3, padding=1)),
            (normal(N, 6, 5),),
        ),
        Example(
            "a block, used twice",
            lambda: roots.Repeated(nn.Sequential(nn.LayerNorm(6), _square(), nn.GELU())),
            _TOKENS,
        ),
        Example(
            "one weight in two linear layers",
            lambda: roots.Sharing(_square(), _square(), "weight"),
            _TOKENS,
        ),
        Example(
            "one bias in two linear layers",
            lambda: roots.Sharing(_square(), _square(), "bias"),
            _TOKENS,
        ),
        Example(
            "weight and bias in two linear layers",
            lambda: roots.Sharing(_square(), _square(), "weight", "bias"),
            _TOKENS,
        ),
        Example(
            "one bias in a linear layer and a norm",
            lambda: roots.Sharing(_square(), nn.LayerNorm(6), "bias"),
            _TOKENS,
        ),
        Example(
            "one weight in a layer norm and an rms norm",
            lambda: roots.Sharing(nn.LayerNorm(6), nn.RMSNorm(6), "weight"),
            _TOKENS,
        ),
        Example(
            "one kernel in two convolutions of other strides",
            lambda: roots.Sharing(nn.Conv1d(6, 6, 3), nn.Conv1d(6, 6, 3, stride=2), "weight"),
            (normal(N, 6, 9),),
        ),
        Example(
            "one kernel in convolutions of other padding modes",
            lambda: roots.Sharing(
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                "weight",
            ),
            (normal(N, 4, 4, 5),),
        ),
        Example(
            "one kernel in convolutions of other groups",
            lambda: roots.Branches(*_grouped()),
            (normal(N, 4, 6),),
        ),
        Example("two weights in one storage", roots.OneStorage, _TOKENS),
        Example("embedding tied to a head", roots.Tied, (indices(N, 6),)),
        Example("embedding tied to a head with a bias", lambda: roots.Tied(True), (indices(N, 6),)),
        Example(
            "embedding tied to a head whose bias is frozen",
            lambda: roots.Tied(True),
            (indices(N, 6),),
            frozen=("head.bias",),
        ),
        Example(
            "embedding tied to a head, padding",
            lambda: roots.Tied(padding_idx=2),
            (indices(N, 6),),
        ),
        Example("embedding tied to a head, one index", roots.Tied, (indices(N),)),
        Example(
            "embedding tied to a head, as many tokens as samples", roots.Tied, (indices(N, N),)
        ),
        Example(
            "bag, embedding and head tied, sum", lambda: roots.TiedBag("sum"), (indices(N, 6),)
        ),
        Example(
            "bag, embedding and head tied, mean", lambda: roots.TiedBag("mean"), (indices(N, 6),)
        ),
        Example(
            "one table, two names",
            lambda: roots.Branches(*[nn.Embedding(VOCABULARY, 5)] * 2),
            (indices(N, 6),),
        ),
        Example(
            "positions for all samples",
            lambda: roots.WithPositions(nn.Linear(6, 7)),
            (normal(N, 5, 6),),
        ),
        Example(
            "positions for all samples, only these",
            lambda: roots.WithPositions(nn.Linear(6, 7)),
            (normal(N, 5, 6),),
            frozen=("inner.weight", "inner.bias"),
        ),
    ],
)


def _owner(n: int, generator: Generator) -> Tensor:
    """Draw which of n samples own each of n + 3 rows; the last one owns none."""
    owned = torch.randint(0, max(1, n - 1), (n + 3,), generator=generator)
    owned[: n - 1] = torch.arange(n - 1)
    return owned


def _rows(*shape: int) -> Draw:
    """Draw n + 3 rows."""
    return lambda n, generator: normal(n + 3, *shape)(n, generator)


CALLS = named(
    "call",
    [
        Example("call, mapping returned", lambda: roots.AsDict(nn.Linear(6, 7)), _TOKENS),
        Example("call, tuple returned", lambda: roots.AsTuple(nn.Linear(6, 7)), _TOKENS),
        Example(
            "call, two inputs",
            lambda: roots.Gated(nn.Linear(6, 7)),
            (normal(N, 3, 6), normal(N, 3, 7)),
        ),
        Example(
            "call, second input by keyword",
            lambda: roots.Gated(nn.Linear(6, 7)),
            (normal(N, 3, 6),),
            {"gate": normal(N, 3, 7)},
        ),
        Example(
            "call, three inputs, one of one row",
            lambda: roots.Gated(nn.Linear(6, 7)),
            (normal(N, 3, 6),),
            {"gate": normal(N, 1, 7), "shift": normal(1, 3, 7)},
        ),
        Example("call, recomputed", lambda: roots.Checkpointed(nn.Linear(6, 7)), _TOKENS),
        Example(
            "call, a block recomputed",
            lambda: roots.Checkpointed(
                nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 7), nn.Dropout(0.5))
            ),
            _TOKENS,
        ),
        Example(
            "call, without gradients and detached",
            lambda: roots.PartlyDetached(nn.Linear(6, 7)),
            _TOKENS,
        ),
        Example(
            "call, several branches",
            lambda: roots.Branches(nn.Linear(6, 7), nn.Linear(6, 7, bias=False), nn.Linear(6, 7)),
            _TOKENS,
        ),
        Example(
            "sequence first, linear",
            lambda: roots.SequenceFirst(nn.Linear(6, 7)),
            _TOKENS,
            options={"batch_dim": {"inner": 1}},
        ),
        Example(
            "sequence first, linear, as many tokens as samples",
            lambda: roots.SequenceFirst(nn.Linear(6, 7)),
            (normal(N, N, 6),),
            options={"batch_dim": {"inner": 1}},
        ),
        Example(
            "sequence first, layer norm",
            lambda: roots.SequenceFirst(nn.LayerNorm(6)),
            _TOKENS,
            options={"batch_dim": {"inner": 1}},
        ),
        Example(
            "sequence first, embedding",
            lambda: roots.SequenceFirst(nn.Embedding(VOCABULARY, 5)),
            (indices(N, 6),),
            options={"batch_dim": {"inner": 1}},
        ),
        Example(
            "sequence first, a block",
            lambda: roots.SequenceFirst(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 7))),
            _TOKENS,
            options={"batch_dim": {"inner.*": 1}},
        ),
        Example(
            "sequence first, the whole model",
            lambda: nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7)),
            (normal(3, N, 6),),
            options={"batch_dim": {"*": 1}},
        ),
        Example("folded, linear", lambda: roots.Folded(nn.Linear(6, 7)), _TOKENS),
        Example("folded, linear, no bias", lambda: roots.Folded(nn.Linear(6, 7, False)), _TOKENS),
        Example("folded, tokens", lambda: roots.Folded(nn.Linear(6, 7)), (normal(N, 3, 2, 6),)),
        Example(
            "folded, sample minor",
            lambda: roots.SequenceFirst(roots.Folded(nn.Linear(6, 7))),
            _TOKENS,
        ),
        Example(
            "folded, as many tokens as samples",
            lambda: roots.Folded(nn.Linear(6, 7)),
            (normal(N, N, 6),),
        ),
        Example("folded, layer norm", lambda: roots.Folded(nn.LayerNorm(6)), _TOKENS),
        Example(
            "folded, embedding",
            lambda: roots.Folded(nn.Embedding(VOCABULARY, 5)),
            (indices(N, 6),),
        ),
        Example(
            "folded, conv2d", lambda: roots.Folded(nn.Conv2d(3, 5, 2)), (normal(N, 2, 3, 4, 3),)
        ),
        Example(
            "folded, used twice", lambda: roots.Folded(roots.Repeated(nn.Linear(6, 6))), _TOKENS
        ),
        Example(
            "rows of samples, linear",
            lambda: roots.SeveralRows(nn.Linear(6, 7)),
            (normal(N, 7), _rows(6)),
            {"owner": _owner},
            options={"row_owner": {"inner": "owner"}},
        ),
        Example(
            "rows of samples, conv2d",
            lambda: roots.SeveralRows(nn.Conv2d(3, 5, 2)),
            (normal(N, 30), _rows(3, 4, 3)),
            {"owner": _owner},
            options={"row_owner": {"inner": "owner"}},
        ),
    ],
)
