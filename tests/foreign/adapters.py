"""Fine-tuning as peft does it: LoRA, DoRA, IA3, prompt, prefix and p-tuning, each rebuilt."""

from __future__ import annotations

from functools import partial

import torch
from tests.foreign.blocks import attend, heads_of
from tests.foreign.foreign import Batch, Foreign, next_token_loss, tokens
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Base(nn.Module):
    """A frozen model with one attention layer, whose projections an adapter replaces.

    Args:
        adapt: Makes an adapted layer of a linear one; None to leave layers alone.
    """

    def __init__(
        self, adapt: type[nn.Module] | None = None, width: int = 8, vocabulary: int = 11
    ) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.requires_grad_(False)
        if adapt is not None:
            self.q, self.v = adapt(self.q), adapt(self.v)

    def run(self, x: Tensor, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Run on embedded tokens, `[N, T, 8]`, with keys and values put before its own."""
        q, k, v = (heads_of(layer(x), 2) for layer in (self.q, self.k, self.v))
        if prefix is None:
            return self.head(x + self.o(attend(q, k, v)))
        k, v = torch.cat((prefix[0], k), 2), torch.cat((prefix[1], v), 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.o(y))

    def forward(self, ids: Tensor) -> Tensor:
        return self.run(self.emb(ids))


class LoRA(nn.Module):
    """Two low-rank layers beside a frozen one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, width = base, base.in_features
        self.lora_A = nn.Linear(width, 2, bias=False)
        self.lora_B = nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B(self.lora_A(x))


class DoRA(LoRA):
    """LoRA whose weight is normalised by column norms, with a learned magnitude of its own.

    The low-rank product is computed from a unit matrix, which has nothing of the batch.
    """

    class Magnitude(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.weight = nn.Parameter(base.weight.norm(dim=1))

        def forward(self, x: Tensor, base: nn.Linear, down: nn.Module, up: nn.Module) -> Tensor:
            unit = torch.eye(down.weight.shape[1], dtype=x.dtype)
            delta = up(down(unit)).T
            norm = (base.weight + 2 * delta.detach()).norm(dim=1).detach()
            scale = (self.weight / norm)[None]
            plain = base(x) - base.bias
            return (scale - 1) * plain + scale * up(down(x)) * 2

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.magnitude = self.Magnitude(base)

    def forward(self, x: Tensor) -> Tensor:
        added = self.magnitude(x, self.base_layer, self.lora_A, self.lora_B)
        return self.base_layer(x) + added


class IA3(nn.Module):
    """A learned factor `[1, d]` for a frozen layer's outputs, in a list of the layer itself."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.ia3_l = base, nn.ParameterDict({"default": torch.ones(8, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.ia3_l["default"].flatten()


class FourierFT(nn.Module):
    """A weight from few learned frequencies, written into zeros."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.spectrum = base, nn.ParameterDict({"default": torch.randn(5)})
        self.indices = torch.stack((torch.arange(5), torch.tensor([3, 0, 2, 7, 5])))

    def forward(self, x: Tensor) -> Tensor:
        dense = torch.zeros(8, 8, dtype=x.dtype)
        dense[self.indices[0], self.indices[1]] = self.spectrum["default"]
        return self.base_layer(x) + F.linear(x, torch.fft.ifft2(dense).real * 150)


class AdapterV2(nn.Module):
    """litgpt's AdapterV2Linear: a factor and a bias for a frozen layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.linear = base
        self.adapter_bias = nn.Parameter(torch.zeros(8))
        self.adapter_scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter_scale * (self.linear(x) + self.adapter_bias)


class AdapterV2Prompt(nn.Module):
    """LLaMA-Adapter V2: the adapted projection also runs on a prompt of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter_wte = Base(AdapterV2), nn.Embedding(3, 8)
        self.gating_factor = nn.Parameter(torch.zeros(1, 2, 1, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x, prompt = self.base.emb(ids), self.adapter_wte.weight.reshape(1, 3, 8)
        q, k, v = (heads_of(layer(prompt), 2) for layer in (self.base.q, self.base.k, self.base.v))
        y = F.scaled_dot_product_attention(heads_of(self.base.q(x), 2), k, v) * self.gating_factor
        return self.base.run(x) + self.base.head(y.transpose(1, 2).flatten(2) + q.mean())


class MergedEmbedding(nn.Module):
    """LoRA of an embedding: the low-rank tables are parameters, used functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Base()
        self.embedding_A = nn.Parameter(torch.randn(2, 11))
        self.embedding_B = nn.Parameter(torch.randn(8, 2))

    def forward(self, ids: Tensor) -> Tensor:
        added = F.embedding(ids, self.embedding_A.T) @ self.embedding_B.T
        return self.base.run(self.base.emb(ids) + added)


class Prompt(nn.Module):
    """Virtual tokens, computed from `arange`, repeated for each sample and put in front.

    Args:
        encoder: What follows the table: nothing (prompt tuning), or an MLP (p-tuning).
        batched: Whether the indices are expanded to one row per sample before, as in peft.
    """

    def __init__(self, encoder: bool, *, batched: bool) -> None:
        super().__init__()
        self.base, self.table, self.batched = Base(), nn.Embedding(3, 8), batched
        layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)] if encoder else []
        self.mlp = nn.Sequential(*layers)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(3)[None]
        if self.batched:
            prompts = self.mlp(self.table(at.expand(len(ids), -1)))
        else:
            prompts = self.mlp(self.table(at)).repeat(len(ids), 1, 1)
        return self.base.run(torch.cat((prompts, self.base.emb(ids)), 1))[:, 3:]


class PromptWithoutAxis(Prompt):
    """As peft's p-tuning: the table's rows have no axis for samples, `[P, d]`."""

    def forward(self, ids: Tensor) -> Tensor:
        prompts = self.mlp(self.table(torch.arange(3)))[None].repeat(len(ids), 1, 1)
        return self.base.run(torch.cat((prompts, self.base.emb(ids)), 1))[:, 3:]


class Prefix(nn.Module):
    """Keys and values of virtual tokens, `[P, 2 · d]`, in front of each sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.table = Base(), nn.Embedding(3, 8)
        self.transform = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 16))

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(3)[None].expand(len(ids), -1)
        keys, values = self.transform(self.table(at)).chunk(2, -1)
        prefix = heads_of(keys, 2), heads_of(values, 2)
        return self.base.run(self.base.emb(ids), prefix)


def _ids(n: int) -> Batch:
    return {"ids": tokens(n, 5)}


def _next_token(model: nn.Module, batch: Batch) -> Tensor:
    return next_token_loss(model(batch["ids"]), batch["ids"])


def _tuned(name: str, make: object, **options: object) -> Foreign:
    return Foreign(name, make, _ids, _next_token, **options)  # type: ignore[arg-type]


ADAPTERS = [
    _tuned("lora", partial(Base, LoRA), everyday=True),
    _tuned("dora", partial(Base, DoRA), everyday=True),
    _tuned("dora_odd_batch", partial(Base, DoRA), n=3),
    _tuned("dora_as_many_samples_as_features", partial(Base, DoRA), n=8),
    _tuned("ia3", partial(Base, IA3), everyday=True),
    _tuned("fourier_ft", partial(Base, FourierFT)),
    _tuned("litgpt_adapter_v2", partial(Base, AdapterV2)),
    _tuned("litgpt_adapter_v2_prompt", AdapterV2Prompt),
    _tuned("lora_embedding", MergedEmbedding),
    _tuned("prompt_tuning", partial(Prompt, False, batched=True), everyday=True),
    _tuned("prompt_tuning_repeated", partial(Prompt, False, batched=False)),
    _tuned("p_tuning", partial(Prompt, True, batched=True)),
    _tuned("p_tuning_repeated", partial(Prompt, True, batched=False)),
    _tuned("p_tuning_without_axis", partial(PromptWithoutAxis, True, batched=False)),
    _tuned("p_tuning_square", partial(PromptWithoutAxis, True, batched=False), n=3),
    _tuned("prefix_tuning", Prefix, everyday=True),
]
