"""Language models that read from left to right, on padded texts with attention masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from tests.zoo.family import Batch, Family, lengths_of, mask_of
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 23
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
LIKE_LLAMA = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
}


def texts(left: bool = False) -> Callable[[int, int], Batch]:
    """Return a function that makes N texts of up to T tokens, padded on the right or the left."""

    def batch(n: int, tokens: int) -> Batch:
        mask = mask_of(lengths_of(n, tokens), tokens, left)
        return {"input_ids": different(n, tokens) * mask, "attention_mask": mask}

    return batch


def different(n: int, tokens: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Return ids `[N, T]`, in each row all different: attention to one's like has no gradient."""
    return torch.rand(n, vocabulary - 2).argsort(1)[:, :tokens] + 2


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of each text over its own tokens, `[N]`."""
    logits = model(**batch).logits
    return text_losses(logits[:, :-1], batch["input_ids"][:, 1:], next_mask(batch))


def next_mask(batch: Batch) -> Tensor:
    """Return which tokens `[N, T - 1]` are predicted from a token of the text."""
    mask: Tensor = batch["attention_mask"]
    return mask[:, 1:] * mask[:, :-1]


def text_losses(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy of each text, in float64.

    Args:
        logits: `[N, T, V]`.
        targets: `[N, T]`.
        mask: One where a target counts, `[N, T]`.
    """
    each = functional.cross_entropy(logits.double().mT, targets, reduction="none")
    return (each * mask).sum(1) / mask.sum(1)


def llama_config(**options: Any) -> transformers.LlamaConfig:
    """Return the configuration of a tiny Llama."""
    return transformers.LlamaConfig(**LIKE_LLAMA | options)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=12, n_layer=2, n_head=2, **SPECIAL
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=32, **SPECIAL,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=12, word_embed_proj_dim=12, num_hidden_layers=2,
        ffn_dim=20, num_attention_heads=2, max_position_embeddings=32, **SPECIAL,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def bloom() -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=12, n_layer=2, n_head=2, **SPECIAL
    )
    return transformers.BloomForCausalLM(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config())


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LIKE_LLAMA))


def gemma2() -> nn.Module:
    # Every window must reach a token of the text: elsewhere float64 has NaN, from a mask cast to
    # float32's infinity.
    config = transformers.Gemma2Config(**LIKE_LLAMA, sliding_window=5)
    return transformers.Gemma2ForCausalLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**LIKE_LLAMA, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def mixtral_eager() -> nn.Module:
    model: Any = mixtral()
    model.set_experts_implementation("eager")  # the default's kernel has no float64
    return model


def mamba(**options: Any) -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        state_size=4,
        num_hidden_layers=2,
        **SPECIAL,
        **options,
    )
    return transformers.MambaForCausalLM(config)


def decoder(make: Callable[[], nn.Module], *, left: bool = False, **options: Any) -> Family:
    return Family(make, texts(left), next_token_losses, **options)


DECODERS = {
    "gpt2": decoder(gpt2, stochastic=True),
    "gpt_neox": decoder(gpt_neox, left=True),
    "opt": decoder(opt, stochastic=True, zero=("*.k_proj.bias",)),
    "bloom": decoder(bloom),
    "llama": decoder(llama, left=True),
    "qwen3": decoder(qwen3),
    "gemma2": decoder(gemma2, in_float32=("Gemma2RMSNorm: output * (1.0 + self.weight.float())",)),
    "mixtral": decoder(mixtral_eager),
    "mixtral_grouped": decoder(
        mixtral,
        dtype=torch.float32,
        in_float32=("torch.nn.functional.grouped_mm, which takes no float64",),
    ),
    "mixtral_but_experts": decoder(mixtral_eager, options={"exclude": "*.mlp.*"}),
    "mamba": decoder(mamba),
    "mamba_without_cache": decoder(partial(mamba, use_cache=False)),
}
