"""A model that hears."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tests.zoo.family import Batch, Family, Losses, curved, lengths_of, mask_of
from torch import Tensor, nn

FRAME, FIRST_FRAME = 320, 400
"""Samples of sound from one frame to the next, and those that the first one hears."""


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, conv_dim=[4] * 7,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def sounds(n: int, tokens: int) -> Batch:
    """Make N sounds of up to T frames."""
    most = FIRST_FRAME + (tokens - 1) * FRAME
    lengths = FIRST_FRAME + (lengths_of(n, tokens) - 1) * FRAME
    mask = mask_of(lengths, most)
    return {"input_values": torch.randn(n, most) * mask, "attention_mask": mask}


def frame_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss of each sound's frames."""
    logits = model(**batch).logits
    frames = (batch["attention_mask"].sum(1) - FIRST_FRAME) // FRAME + 1
    return curved(logits.double().log_softmax(-1) * mask_of(frames, logits.shape[1])[..., None])


def unmasked(n: int, tokens: int) -> Batch:
    """Make N sounds of T frames, without a mask, as its feature extractor was trained."""
    return {"input_values": torch.randn(n, FIRST_FRAME + (tokens - 1) * FRAME)}


def all_frame_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss of each sound's frames, all of them."""
    return curved(model(**batch).logits.double().log_softmax(-1))


def hearing(batch: Callable[[int, int], Batch], losses: Losses) -> Family:
    return Family(
        wav2vec2,
        batch,
        losses,
        tokens=12,  # training masks stretches of ten frames
        stochastic=True,
        unused=("wav2vec2.masked_spec_embed",),
        zero=("*.k_proj.bias",),
    )


AUDIO = {
    "wav2vec2": hearing(sounds, frame_losses),
    "wav2vec2_unmasked": hearing(unmasked, all_frame_losses),
}
