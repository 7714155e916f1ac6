from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import SamplerRegistry
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients

VOCABULARY = 13
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "head_dim": 4}
LLAMA_LIKE = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "intermediate_size": 12,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=VOCABULARY, use_cache=False
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**LLAMA_LIKE, use_cache=False, pad_token_id=0)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def gemma2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(**LLAMA_LIKE, use_cache=False)
    model: nn.Module = transformers.Gemma2ForCausalLM(config)
    return model


def losses(model: nn.Module, index: Tensor, lengths: Tensor) -> Tensor:
    """Return each text's mean loss over its own tokens, from logits in float64: `[N]`."""
    logits = model(index).logits[:, :-1]
    loss = functional.cross_entropy(logits.transpose(1, 2), index[:, 1:], reduction="none")
    kept = torch.arange(1, index.shape[1]) < lengths[:, None]
    return (loss * kept).sum(1) / kept.sum(1)


@pytest.mark.parametrize(("n", "tokens"), [(3, 5), (4, 4), (1, 6)])
@pytest.mark.parametrize(
    ("make", "tolerance"),
    # Gemma multiplies by `weight.float()`, so that autograd adds up in float32.
    [(gpt2, 1e-9), (llama, 1e-9), (gemma2, 1e-6)],
)
def test_every_parameter_of_a_language_model(
    registry: SamplerRegistry, make: Any, tolerance: float, n: int, tokens: int
) -> None:
    model = shuffled(make().double().eval())
    index = torch.randint(VOCABULARY, (n, tokens))
    # The first token attends to itself alone, whatever its query: a loss needs a second one.
    lengths = torch.arange(n) % (tokens - 2) + 3
    with GradientHolder(model, registry=registry) as engine, engine.batch(range(n)) as batch:
        losses(model, index, lengths).sum().backward()
    expected = per_sample_gradients(model, losses(model, index, lengths))
    held = batch.result.materialize()
    assert held.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert gradient.flatten(1).any(1).all(), name
        scale = gradient.flatten(1).norm(dim=1).reshape(n, *[1] * (gradient.dim() - 1))
        assert_within(held[name], gradient, scale, tolerance, name)


def test_tied_head_and_embedding_are_one_parameter(registry: SamplerRegistry) -> None:
    model = shuffled(gpt2().double().eval())
    index = torch.randint(VOCABULARY, (3, 5))
    with GradientHolder(model, registry=registry) as engine, engine.batch(range(3)) as batch:
        losses(model, index, torch.full((3,), 5)).sum().backward()
    assert len(batch.result.gradients("transformer.wte.weight")) == 2


def test_convolutional_network(registry: SamplerRegistry) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(4).eval(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).double()
    shuffled(model)
    inputs = torch.randn(4, 3, 8, 6, dtype=torch.float64)
    with GradientHolder(model, registry=registry) as engine, engine.batch(range(4)) as batch:
        model(inputs).square().sum().backward()
    expected = per_sample_gradients(model, model(inputs).square().sum(1))
    for name, held in batch.result.materialize().items():
        assert expected[name].any(), name
        scale = expected[name].flatten(1).norm(dim=1)
        scale = scale.reshape(4, *[1] * (held.dim() - 1))
        assert_within(held, expected[name], scale, 1e-9, name)


def shuffled(model: nn.Module) -> nn.Module:
    """Move parameters away from zeros and ones, behind which gradients may vanish."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model
