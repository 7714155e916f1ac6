"""Multi-head attention, and the transformer layers of torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ghost_core.testing.cases import roots
from ghost_core.testing.cases.roots import around
from ghost_core.testing.examples import LayerExample, N, given, named, normal

Example = partial(LayerExample, generic=True)


class ToItself(roots.Around):
    """Attends from a sequence to itself; masks and options are passed on."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__(inner)
        self.options = tuple(options.items())

    def forward(self, inputs: Tensor, **masks: Tensor) -> Any:
        """Return the outputs, and not the weights of the heads."""
        return self.inner(inputs, inputs, inputs, **dict(self.options), **masks)[0]


def _attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 2, batch_first=True, **options)


def _padding(n: int, generator: Generator) -> Tensor:
    """Mask the last tokens of some samples, bool `[N, 3]`."""
    return torch.arange(3) > torch.arange(n)[:, None] % 3


def _masks_by_head(n: int, generator: Generator) -> Tensor:
    """Draw what is added to the logits, `[N·2, 3, 3]`."""
    return torch.randn(2 * n, 3, 3, dtype=torch.float64, generator=generator)


_CAUSAL = torch.ones(3, 3).triu(1).bool()
_ADDED = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)
_TOKENS = (normal(N, 3, 6),)

_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "dropout in training": {"dropout": 0.5},
}


def _multihead() -> Iterator[LayerExample]:
    for what, options in _OPTIONS.items():
        yield Example(
            f"attention, {what}".removesuffix(", "),
            around(ToItself, partial(_attention, **options)),
            _TOKENS,
        )
    masks: dict[str, dict[str, Any]] = {
        "padding": {"key_padding_mask": _padding},
        "causal": {"attn_mask": given(_CAUSAL)},
        "added mask": {"attn_mask": given(_ADDED)},
        "causal, padding": {"attn_mask": given(_CAUSAL), "key_padding_mask": _padding},
        "mask by sample and head": {"attn_mask": _masks_by_head},
    }
    for what, inputs in masks.items():
        yield Example(f"attention, {what}", lambda: ToItself(_attention()), _TOKENS, inputs)
    yield Example(
        "attention, no weights", lambda: ToItself(_attention(), need_weights=False), _TOKENS
    )
    yield Example(
        "attention, weights of every head",
        lambda: ToItself(_attention(), average_attn_weights=False),
        _TOKENS,
    )
    yield Example(
        "attention, as many tokens as samples", lambda: ToItself(_attention()), (normal(N, N, 6),)
    )
    yield Example(
        "attention, sequence first",
        lambda: roots.SequenceFirst(nn.MultiheadAttention(6, 2)),
        _TOKENS * 3,
        options={"batch_dim": {"inner": 1}},
    )
    yield Example(
        "attention, only the output map",
        lambda: ToItself(_attention()),
        _TOKENS,
        frozen=("inner.in_proj_weight", "inner.in_proj_bias"),
    )
    yield Example("attention, used twice", lambda: roots.TwoNames(ToItself(_attention())), _TOKENS)
    across = (normal(N, 3, 6), normal(N, 5, 6), normal(N, 5, 6))
    yield Example("attention, across", _attention, across)
    yield Example(
        "attention, across, other widths",
        lambda: _attention(kdim=4, vdim=5),
        (normal(N, 3, 6), normal(N, 5, 4), normal(N, 5, 5)),
    )
    yield Example(
        "attention, across, other widths, no bias, no weights",
        lambda: _attention(kdim=4, vdim=5, bias=False),
        (normal(N, 3, 6), normal(N, 5, 4), normal(N, 5, 5)),
        {"need_weights": given(False)},
    )


def _encoder(**options: Any) -> nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.0} | options
    return nn.TransformerEncoderLayer(6, 2, 8, **options)


def _decoder(**options: Any) -> nn.TransformerDecoderLayer:
    options = {"batch_first": True, "dropout": 0.0} | options
    return nn.TransformerDecoderLayer(6, 2, 8, **options)


_BLOCKS: dict[str, dict[str, Any]] = {
    "": {},
    "norm first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": nn.functional.silu},
    "norm first, gelu": {"norm_first": True, "activation": "gelu"},
    "no bias": {"bias": False},
    "dropout in training": {"dropout": 0.3},
}


def _transformers() -> Iterator[LayerExample]:
    memory = (normal(N, 3, 6), normal(N, 5, 6))
    for what, options in _BLOCKS.items():
        yield Example(
            f"encoder layer, {what}".removesuffix(", "), partial(_encoder, **options), _TOKENS
        )
        yield Example(
            f"decoder layer, {what}".removesuffix(", "), partial(_decoder, **options), memory
        )
    yield Example("encoder layer, padding", _encoder, _TOKENS, {"src_key_padding_mask": _padding})
    yield Example("encoder layer, causal", _encoder, _TOKENS, {"src_mask": given(_CAUSAL)})
    yield Example(
        "encoder layer, sequence first",
        lambda: roots.SequenceFirst(_encoder(batch_first=False)),
        _TOKENS,
        options={"batch_dim": {"inner.*": 1}},
    )
    yield Example(
        "decoder layer, causal",
        _decoder,
        memory,
        {"tgt_mask": given(_CAUSAL), "tgt_is_causal": given(True)},
    )
    yield Example(
        "decoder layer, sequence first",
        lambda: roots.SequenceFirst(_decoder(batch_first=False)),
        memory,
        options={"batch_dim": {"inner.*": 1}},
    )
    yield Example(
        "encoder of two layers",
        lambda: nn.TransformerEncoder(
            _encoder(), 2, norm=nn.LayerNorm(6), enable_nested_tensor=False
        ),
        _TOKENS,
    )
    yield Example("decoder of two layers", lambda: nn.TransformerDecoder(_decoder(), 2), memory)
    yield Example(
        "transformer",
        lambda: nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        memory,
    )


ATTENTION = named("attention", _multihead())
TRANSFORMERS = named("transformer", _transformers())
