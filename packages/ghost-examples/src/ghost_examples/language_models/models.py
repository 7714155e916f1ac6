"""Causal language models: GPT-2 in four sizes, or any on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ghost_core import UnknownNameError
from ghost_engines import CorpusError


@dataclass(frozen=True)
class Shape:
    """How large a GPT-2 is."""

    layers: int
    width: int
    heads: int


PRESETS = {
    "tiny": Shape(2, 96, 4),
    "small": Shape(12, 768, 12),
    "medium": Shape(24, 1024, 16),
    "large": Shape(36, 1280, 20),
}
"""Sizes of GPT-2: all but the first are those of its paper."""


def new_gpt2(
    preset: str, *, vocabulary: int, length: int, dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """Return a GPT-2 with random parameters for token ids below `vocabulary`.

    Raises:
        UnknownNameError: If there is no such preset.
    """
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    shape = PRESETS[preset]
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        # GPT-2's own for its smallest; narrower ones whose embeddings are as small have gradients
        # that jump wherever a sum of two happens to be near zero before it is normalised.
        initializer_range=0.02 * (PRESETS["small"].width / shape.width) ** 0.5,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,  # GPT-2's own is outside of other vocabularies
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def load_causal(folder: Path, *, vocabulary: int, length: int) -> nn.Module:
    """Return the causal language model in a folder. Nothing is downloaded.

    Raises:
        CorpusError: If there is none, it cannot be read, or its vocabulary or positions do not
            suffice for the data.
    """
    if not (folder / "config.json").is_file():
        names = sorted(each.name for each in folder.iterdir())[:20] if folder.is_dir() else []
        raise CorpusError(
            f"there is no model in {folder}",
            reason=f"the folder has {', '.join(names) or 'nothing'}, and no config.json",
            remedy="give a folder that save_pretrained has written",
        )
    model = _read(folder)
    config = model.config.get_text_config()
    if config.vocab_size < vocabulary:
        raise CorpusError(
            f"the model in {folder} has {config.vocab_size} token ids, the data {vocabulary}",
            reason="its embedding has no row for the others",
            remedy="make the data with the model's own tokenizer: "
            f"python -m ghost_examples.tokenize --tokenizer {folder} ...",
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise CorpusError(
            f"the model in {folder} has {positions} positions, and blocks have {length} tokens",
            remedy=f"make the data with --length {positions} or less",
        )
    config.use_cache = False
    found: nn.Module = model
    return found


def _read(folder: Path) -> Any:
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, found = load(folder, local_files_only=True, output_loading_info=True)
    # The last one is raised where tensors have other shapes than the config says.
    except (OSError, ValueError, SafetensorError, StrictDataclassError, RuntimeError) as error:
        said = " ".join(str(error).split("\n\n")[0].split())
        raise CorpusError(f"the model in {folder} cannot be read: {said}") from error
    if missing := sorted(found["missing_keys"]):
        raise CorpusError(
            f"the model in {folder} has no weights for {shorten(', '.join(missing), 200)}",
            reason="random numbers would stand in their place",
        )
    return model


def per_sample_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss over the predicted tokens of each sample, `[N, T]` to float32 `[N]`."""
    logits = model(tokens).logits[:, :-1].float()
    return cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)
