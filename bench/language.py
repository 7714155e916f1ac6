"""Language models: GPT-2."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from bench import by_hand
from bench.case import Case, Setting, Way
from bench.steps import Loss, plain, projected, scored
from ghost_engines import DotProductEngine


def gpt2(setting: Setting) -> tuple[nn.Module, Loss, int]:
    """Return GPT-2 without dropout, the loss of a batch of token ids, and N."""
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds

    layers, width, length, n = (2, 16, 8, 4) if setting.tiny else (4, 256, 128, 8)
    vocabulary = 50 if setting.tiny else 2048
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, vocab_size=vocabulary, n_positions=length,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2,
        use_cache=False,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    ids = torch.randint(vocabulary, (n, length), device=setting.device)
    return model.to(setting.device), lambda model: model(ids, labels=ids).loss, n


def gpt2_modes(setting: Setting) -> Mapping[str, Way]:
    """Make a plain step, scored ones by mode, and ones with their products by hand."""
    model, loss, n = gpt2(setting)
    with_validation = concatenated(setting, model, n)
    return {
        "plain": plain(model, loss),
        "exact, products alone": by_hand.dots(model, loss),
        "exact": scored(setting, model, loss, n),
        "fused, products alone": by_hand.built(model, loss, norms=False),
        "fused": scored(setting, model, loss, n, mode="fused"),
        "fused, norms, products alone": by_hand.built(model, loss, norms=True),
        "fused, norms": scored(setting, model, loss, n, mode="fused", norms=True),
        "concatenated, M = 2": with_validation,
    }


def concatenated(setting: Setting, model: nn.Module, n: int) -> Way:
    """Return a step of N samples and two validation samples that go through the model with them."""
    model = copy.deepcopy(model)
    config: Any = model.config
    shape = n + 2, config.n_positions
    ids = torch.randint(config.vocab_size, shape, device=setting.device)
    following = pad(ids[:, 1:], (0, 1), value=-100)  # after the last token there is nothing
    engine = setting.stack.enter_context(DotProductEngine(model, mode="concatenated"))

    def run() -> None:
        both = engine.concatenate(ids[:n], ids[n:])
        with engine.batch(range(n)):
            logits = model(both).logits.flatten(0, 1)  # as the model's own loss does
            each = cross_entropy(logits, following.flatten(), reduction="none").view(shape)
            losses = each.sum(1) / (shape[1] - 1)
            engine.backward(losses, train_weight=1 / n, validation_weight=1 / 2)

    return Way(run, model.zero_grad)


def gpt2_projection(setting: Setting) -> Mapping[str, Way]:
    """Make a plain step, and projected ones: beside training, and without weight gradients."""
    model, loss, n = gpt2(setting)
    return {
        "plain": plain(model, loss),
        "training": projected(setting, model, loss, n, frozen=False),
        "frozen": projected(setting, model, loss, n, frozen=True),
    }


CASES = [
    Case(
        "gpt2_dots",
        "GPT-2, 4 layers of 256, N = 8, T = 128, dots with one direction, by mode",
        gpt2_modes,
        goals={"exact": 1.32, "fused": 1.06, "fused, norms": 1.09, "concatenated, M = 2": 1.36},
        needs=("transformers",),
    ),
    Case(
        "gpt2_projection",
        "GPT-2, 4 layers of 256, N = 8, T = 128, rows of 256 numbers for each parameter",
        gpt2_projection,
        needs=("transformers",),
    ),
]
