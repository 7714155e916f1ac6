"""`MultiheadAttention` written out, down to the linear maps that it consists of.

With one input x for queries, keys and values, `[q k v] = W x` and `y = V a(q, k, v)`: one backward
pass for all samples gives the gradients b of `[q k v]`, and c of y is given, so that

    g_n = Σ_t b[n, t] ⊗ x[n, t]  for W
    g_n = Σ_t c[n, t] ⊗ a[n, t]  for V
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_layers.replay import LinearMap, WrittenOut


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # a hint: the mask says the same
) -> WrittenOut:
    """Do what `MultiheadAttention` does, without dropout; the inputs are its own.

    Args:
        module: The attention.
        query: `[N, T, d]`, or `[T, N, d]` without `batch_first`; the others likewise.
        key: `[N, S, d]`.
        value: `[N, S, d]`.
        key_padding_mask: `[N, S]`.
        need_weights: Whether the weights are returned.
        attn_mask: `[T, S]` or `[N·heads, T, S]`.
        average_attn_weights: Whether those returned are averaged over heads.
        is_causal: Whether the mask is causal.
    """
    made = list(_projections(module, query, key, value))
    parts = [part for each in made for part in each.results.split(module.embed_dim, -1)]
    q, k, v = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in parts)
    mask = _mask(q, k, key_padding_mask, attn_mask)
    weights = None
    if need_weights:
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        mixed = weights @ v
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask)
    mixed = mixed.transpose(1, 2).flatten(2)
    out = LinearMap.of(module, "out_proj.weight", "out_proj.bias", mixed)
    outputs = [out.results if module.batch_first else out.results.transpose(0, 1)]
    if weights is not None:
        outputs.append(weights.mean(1) if average_attn_weights else weights)
    return WrittenOut(outputs, [*made, out])


def _projections(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[LinearMap]:
    """Yield the maps to queries, keys and values: one, if all have the same input."""
    same = query is key and key is value
    given = [each if module.batch_first else each.transpose(0, 1) for each in (query, key, value)]
    width, bias = module.embed_dim, "in_proj_bias"
    if module.in_proj_weight is not None and same:
        yield LinearMap.of(module, "in_proj_weight", bias, given[0])
        return
    for at, (name, inputs) in enumerate(zip("qkv", given, strict=True)):
        part = slice(at * width, (at + 1) * width)
        packed = module.in_proj_weight is not None
        weight = "in_proj_weight" if packed else f"{name}_proj_weight"
        yield LinearMap.of(module, weight, bias, inputs, part if packed else slice(None), part)


def _mask(q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return what is added to the scores, `[N, heads, T, S]` or less; None for nothing."""
    added = None
    if mask is not None:
        shape = (1, 1) if mask.dim() == 2 else q.shape[:2]
        added = _as_numbers(mask, q).view(*shape, *mask.shape[-2:])
    if padding is not None:
        per_sample = _as_numbers(padding, q).view(len(k), 1, 1, k.shape[2])
        added = per_sample if added is None else added + per_sample
    return added


def _as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    """Return what a mask adds: where it is true, nothing is attended to."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
