"""Speech: Whisper, whose positions are a slice of a table and the weight of another one."""

from __future__ import annotations

from functools import partial

import torch
from tests.foreign.blocks import attend, heads_of
from tests.foreign.foreign import Batch, Foreign, next_token_loss, tokens
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Positions(nn.Embedding):
    """Transformers' `WhisperPositionalEmbedding`: a slice of the weight, whatever the ids are."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:  # type: ignore[override]
        return self.weight[past : past + ids.shape[1]]


class Attention(nn.Module):
    """Attention to a sequence itself or to another; keys have no bias."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(3))
        self.k_proj, self.causal = nn.Linear(8, 8, bias=False), causal

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q_proj(x) * 2**-0.5, self.k_proj(memory), self.v_proj(memory)
        q, k, v = (heads_of(each, 2) for each in (q, k, v))
        if self.causal:
            return self.out_proj(attend(q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Two convolutions over sound, and positions that are the weight of a table never called."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, 2, 1)
        self.embed_positions = nn.Embedding(frames // 2, 8)
        self.norm, self.attn, self.ln_post = nn.LayerNorm(8), Attention(False), nn.LayerNorm(8)

    def forward(self, sound: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(sound)))).permute(0, 2, 1)
        x = x + self.embed_positions.weight
        y = self.norm(x)
        return self.ln_post(x + self.attn(y, y))


class Whisper(nn.Module):
    """Sound goes into an encoder, which words attend to.

    Args:
        official: Whether positions of words are a bare parameter and the head is a product with the
            words' table, as in OpenAI's code; in transformers it is a layer that is tied.
    """

    def __init__(self, official: bool, frames: int = 8, length: int = 6) -> None:
        super().__init__()
        self.encoder, self.token = Encoder(frames), nn.Embedding(11, 8)
        self.norm1, self.norm2, self.ln = (nn.LayerNorm(8) for _ in range(3))
        self.attn, self.cross_attn = Attention(True), Attention(False)
        if official:
            self.positional_embedding = nn.Parameter(torch.randn(length, 8))
        else:
            self.positions, self.proj_out = Positions(length, 8), nn.Linear(8, 11, bias=False)
            self.proj_out.weight = self.token.weight

    def forward(self, sound: Tensor, ids: Tensor) -> Tensor:
        memory, official = self.encoder(sound), hasattr(self, "positional_embedding")
        at = self.positional_embedding[: ids.shape[1]] if official else self.positions(ids)
        x = self.token(ids) + at
        y = self.norm1(x)
        x = x + self.attn(y, y)
        x = self.ln(x + self.cross_attn(self.norm2(x), memory))
        return x @ self.token.weight.t() if official else self.proj_out(x)


def _sound(n: int) -> Batch:
    return {"sound": torch.randn(n, 3, 8), "ids": tokens(n, 6)}


def _next_token(model: nn.Module, batch: Batch) -> Tensor:
    return next_token_loss(model(batch["sound"], batch["ids"]), batch["ids"])


def _whisper(name: str, official: bool, **options: object) -> Foreign:
    return Foreign(name, partial(Whisper, official), _sound, _next_token, **options)  # type: ignore[arg-type]


SPEECH = [
    _whisper("whisper", False, n=3, everyday=True),
    _whisper("whisper_as_many_samples_as_tokens", False, n=6),
    _whisper("whisper_as_many_samples_as_frames", False, n=4),
    _whisper("openai_whisper", True, n=3),
    _whisper("openai_whisper_as_many_samples_as_tokens", True, n=6),
]
