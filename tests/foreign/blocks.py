"""Attention and other pieces that the patterns share, written as most repositories write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values, and an additive bias."""

    def __init__(self, width: int = 8, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = (*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = 8, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


def distances(length: int) -> Tensor:
    """Return `j - i + T - 1` for all pairs of T positions, `[T, T]`, from 0 to 2T - 2."""
    at = torch.arange(length)
    return at[None] - at[:, None] + length - 1


def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of features by their position, `[N, heads, T, d]`."""
    half = x.shape[-1] // 2
    frequencies = 10.0 ** -torch.arange(half, dtype=x.dtype)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally, `[N, heads, T, d]` to `[N, T, heads · d]`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """Split features into heads, `[N, T, D]` to `[N, heads, T, d]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
