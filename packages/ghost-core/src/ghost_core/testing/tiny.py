"""A model with one of each difficulty, small enough for a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyTransformer(nn.Module):
    """A language model from `torch.nn` alone: token ids `[N, T]` to logits `[N, T, vocabulary]`.

    It has a head tied to the embedding, position embeddings that are computed once for all
    samples, dropout, in-place operations and one frozen parameter, the last norm's bias.

    Args:
        vocabulary: Number of token ids.
        positions: Largest T.
        width: Features.
    """

    def __init__(self, vocabulary: int = 19, positions: int = 8, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.before_attention = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width, bias=False)
        self.last = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.last.bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = self.dropout(self.tokens(ids) + self.positions(places))
        query, key, value = self.attend(self.before_attention(hidden)).chunk(3, dim=-1)
        weights = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)
        hidden = hidden + self.dropout(self.leave(weights @ value))
        inner = self.widen(self.before_mlp(hidden)).relu_()
        hidden = hidden + self.dropout(self.narrow(inner))
        logits: Tensor = self.head(self.last(hidden))
        return logits


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of each sample, `[N]`, from logits in their own dtype or float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    return -chosen.mean((1, 2))
