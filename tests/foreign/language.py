"""Language models: nanoGPT, x-transformers, torchtune, litgpt, word language models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tests.foreign.blocks import Attention, Block, attend, distances, heads_of, rotated
from tests.foreign.foreign import Batch, Foreign, next_token_loss, tokens
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class NanoGPT(nn.Module):
    """Positions are looked up for `arange(T)`, without an axis for samples; the head is tied."""

    def __init__(
        self, tied: bool = True, width: int = 8, vocabulary: int = 11, length: int = 6
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList([Block(width, causal=True) for _ in range(2)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class NanoGPTWithTargets(NanoGPT):
    """As its training script calls it: targets go in, logits and the mean loss come out."""

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(idx)
        return logits, F.cross_entropy(logits.view(-1, 11), targets.reshape(-1))


class ScaledEmbedding(nn.Embedding):
    """torchtune's GemmaNormEmbeddings, and transformers' of Gemma: another forward."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x * torch.tensor(self.embedding_dim**0.5, dtype=x.dtype)


class Llama(nn.Module):
    """torchtune's TransformerDecoder: rotary, RMS norms, gated MLP."""

    def __init__(
        self,
        tied: str = "",
        embedding: type[nn.Embedding] = nn.Embedding,
        width: int = 8,
        vocabulary: int = 11,
    ) -> None:
        super().__init__()
        self.tok_embeddings = embedding(vocabulary, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w2, self.w3 = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.sa_norm, self.mlp_norm, self.norm = (nn.RMSNorm(width) for _ in range(3))
        self.tied = tied
        if not tied:
            self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        y = self.sa_norm(x)
        q, k, v = (heads_of(layer(y), 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(attend(rotated(q), rotated(k), v))
        y = self.mlp_norm(x)
        x = self.norm(x + self.w2(F.silu(self.w1(y)) * self.w3(y)))
        if self.tied == "linear":  # torchtune's TiedLinear
            return F.linear(x, self.tok_embeddings.weight)
        if self.tied == "transposed":  # x-transformers' tie_embedding
            return x @ self.tok_embeddings.weight.t()
        return self.output(x)


class Positions(nn.Module):
    """x-transformers' AbsolutePositionalEmbedding: scaled, without an axis for samples."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.scale = nn.Embedding(6, 8), 8**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.emb(torch.arange(x.shape[1])) * self.scale


class RelativeBias(nn.Module):
    """A table looked up for all pairs of positions: T5's way, in x-transformers."""

    def __init__(self, length: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * length - 1, 2)

    def forward(self, length: int) -> Tensor:
        return self.table(distances(length)).permute(2, 0, 1)


class DynamicBias(nn.Module):
    """x-transformers' DynamicPositionBias: an MLP of the distance, on `[2T - 1, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 2))

    def forward(self, length: int) -> Tensor:
        far = torch.arange(-length + 1, length, dtype=self.mlp[0].weight.dtype)
        return self.mlp(far[:, None])[distances(length)].permute(2, 0, 1)


class LearnedSlopes(nn.Module):
    """ALiBi with learned slopes, a parameter `[heads, 1, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(2, 1, 1))

    def forward(self, length: int) -> Tensor:
        return -(distances(length) - length + 1).abs() * self.slopes


class XTransformer(nn.Module):
    """A decoder of x-transformers, by its options."""

    def __init__(
        self,
        positions: Callable[[], nn.Module] | None = None,
        bias: Callable[[], nn.Module] | None = None,
        memory: int = 0,
        tied: bool = False,
        width: int = 8,
        vocabulary: int = 11,
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = positions() if positions else None
        self.rel_pos = bias() if bias else None
        self.memory_tokens = nn.Parameter(torch.randn(memory, width)) if memory else None
        self.block, self.norm = Block(width, causal=True), nn.LayerNorm(width)
        self.to_logits = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_emb(ids)
        if self.pos_emb is not None:
            x = x + self.pos_emb(x)
        kept = 0
        if self.memory_tokens is not None:
            kept = len(self.memory_tokens)
            x = torch.cat((self.memory_tokens.expand(len(x), -1, -1), x), 1)
        x = self.block(x, None if self.rel_pos is None else self.rel_pos(x.shape[1]))
        x = self.norm(x)[:, kept:]
        return x @ self.token_emb.weight.t() if self.to_logits is None else self.to_logits(x)


class QueryKeyNorm(nn.Module):
    """Attention with learned scales `[heads, 1, d]` behind normalised queries and keys, and GLU."""

    def __init__(self, width: int = 8, vocabulary: int = 11) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, 2 * width)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(2, 1, width // 2)) for _ in range(2))
        self.logits = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        q, k, v = (heads_of(each, 2) for each in self.to_qkv(x).chunk(3, -1))
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        return self.logits(x + F.glu(self.to_out(attend(rotated(q), rotated(k), v)), -1))


class Mixtral(nn.Module):
    """litgpt's LLaMAMoE: rows of all samples are routed to experts, two for each token."""

    def __init__(self, width: int = 8, vocabulary: int = 11) -> None:
        super().__init__()
        self.emb, self.gate = nn.Embedding(vocabulary, width), nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
                for _ in range(3)
            ]
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.emb(ids)
        x = embedded.flatten(0, 1)
        weights, chosen = self.gate(x).topk(2, -1)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            token, place = torch.where(chosen == at)
            y[token] += weights[token, place, None] * expert(x[token])
        return self.head(embedded + y.view_as(embedded))


class WordModel(nn.Module):
    """PyTorch's word language model: LSTM, and the decoder on `[N · T, V]`."""

    def __init__(self, *, batch_first: bool, flat: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.rnn = nn.LSTM(8, 8, batch_first=batch_first)
        self.flat = flat

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rnn(self.encoder(ids))[0]
        return self.decoder(x.reshape(-1, 8)) if self.flat else self.decoder(x)


class LinearLoss(nn.Module):
    """A head and its loss in one module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.loss = nn.LinearCrossEntropyLoss(8, 11, reduction="none")

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.emb(ids)).tanh()[:, :-1].flatten(0, 1)
        return self.loss(hidden, ids[:, 1:].flatten()).view(len(ids), -1).mean(1)


class AdapterPrompt(nn.Module):
    """litgpt's LLaMA-Adapter: a prompt of one row, attended to by all samples, behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.attn = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.adapter_wte = nn.Embedding(3, 8)
        self.gating_factor = nn.Parameter(torch.zeros(1, 1, 2, 1))
        self.proj = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = (heads_of(each, 2) for each in self.attn(self.emb(ids)).chunk(3, -1))
        prompt = self.attn(self.adapter_wte.weight.reshape(1, 3, 8))
        _, ak, av = (heads_of(each, 2) for each in prompt.chunk(3, -1))
        own = attend(q, k, v).unflatten(-1, (2, 4))
        added = F.scaled_dot_product_attention(q, ak, av).transpose(1, 2)
        return self.proj((own + self.gating_factor * added).flatten(2))


def _ids(n: int, length: int = 6) -> Batch:
    return {"ids": tokens(n, length)}


def _next_token(model: nn.Module, batch: Batch) -> Tensor:
    return next_token_loss(model(batch["ids"]), batch["ids"])


def _in_one(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["ids"])


def _with_targets(model: nn.Module, batch: Batch) -> Tensor:
    logits, _ = model(batch["ids"], batch["ids"])
    return next_token_loss(logits, batch["ids"])


def _time_first(model: nn.Module, batch: Batch) -> Tensor:
    return next_token_loss(model(batch["ids"].T).transpose(0, 1), batch["ids"])


def _flat(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch["ids"]
    return next_token_loss(model(ids).view(*ids.shape, -1), ids)


def _flat_time_first(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch["ids"]
    return next_token_loss(model(ids.T).view(*ids.T.shape, -1).transpose(0, 1), ids)


def _attention_only() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), Attention(causal=True), nn.Linear(8, 11))


def _decoder(name: str, make: object, **options: object) -> Foreign:
    return Foreign(name, make, _ids, _next_token, **options)  # type: ignore[arg-type]


LANGUAGE = [
    _decoder("nanogpt", NanoGPT, everyday=True),
    _decoder("nanogpt_as_many_samples_as_tokens", NanoGPT, n=6, everyday=True),
    _decoder("nanogpt_twice_as_many_tokens", NanoGPT, n=3),
    _decoder("nanogpt_untied", partial(NanoGPT, False)),
    Foreign("nanogpt_with_targets", NanoGPTWithTargets, _ids, _with_targets, everyday=True),
    _decoder("attention_only", _attention_only),
    _decoder("torchtune_llama", Llama),
    _decoder("torchtune_llama_tied", partial(Llama, "linear"), everyday=True),
    _decoder("torchtune_gemma_tied", partial(Llama, "linear", ScaledEmbedding), everyday=True),
    _decoder("llama_tied_transposed", partial(Llama, "transposed")),
    _decoder("x_transformers", XTransformer, everyday=True),
    _decoder("x_transformers_positions", partial(XTransformer, Positions), everyday=True),
    _decoder("x_transformers_positions_square", partial(XTransformer, Positions), n=6),
    _decoder("x_transformers_relative", partial(XTransformer, bias=RelativeBias), everyday=True),
    _decoder("x_transformers_relative_square", partial(XTransformer, bias=RelativeBias), n=6),
    _decoder("x_transformers_dynamic_bias", partial(XTransformer, bias=DynamicBias)),
    _decoder("x_transformers_dynamic_bias_11", partial(XTransformer, bias=DynamicBias), n=11),
    _decoder("x_transformers_learned_slopes", partial(XTransformer, bias=LearnedSlopes)),
    _decoder("x_transformers_memory_tokens", partial(XTransformer, memory=2)),
    _decoder("x_transformers_tied", partial(XTransformer, Positions, tied=True)),
    _decoder("x_transformers_qk_norm_glu_rotary", QueryKeyNorm),
    _decoder("litgpt_mixtral", Mixtral, everyday=True),
    _decoder("litgpt_adapter", AdapterPrompt),
    _decoder("litgpt_adapter_square", AdapterPrompt, n=3),
    _decoder("word_model", partial(WordModel, batch_first=True, flat=False)),
    Foreign(
        "word_model_time_first",
        partial(WordModel, batch_first=False, flat=False),
        _ids,
        _time_first,
        options={"batch_dim": {"*": 1, "": 1}},
    ),
    Foreign("word_model_flat", partial(WordModel, batch_first=True, flat=True), _ids, _flat),
    Foreign(
        "word_model_flat_time_first",
        partial(WordModel, batch_first=False, flat=True),
        _ids,
        _flat_time_first,
        options={"batch_dim": {"*": 1, "": 1, "decoder": 0}},
    ),
    Foreign("linear_cross_entropy_loss", LinearLoss, _ids, _in_one),
]
