"""Models of images and texts, and one with adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from tests.zoo.decoders import (
    SPECIAL,
    VOCABULARY,
    decoder,
    different,
    llama,
    llama_config,
    next_mask,
    text_losses,
    texts,
)
from tests.zoo.family import Batch, Family, curved
from torch import Tensor, nn

PATCH, IMAGE_TOKEN = 2, VOCABULARY - 1
VISION = {
    "image_size": 2 * PATCH,
    "patch_size": PATCH,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
TEXT = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "projection_dim": 8,
}


class PairEmbeddings(nn.Module):
    """CLIP up to the embeddings of images and texts, before texts meet images of other pairs."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.clip(**batch)
        return outputs.image_embeds, outputs.text_embeds


def clip() -> nn.Module:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    return transformers.CLIPModel(config)


def clip_embeddings() -> nn.Module:
    model = PairEmbeddings(clip())
    model.clip.logit_scale.requires_grad_(False)  # it matters where pairs meet only
    return model


def images_and_texts(n: int, tokens: int) -> Batch:
    """Make N pairs of an image and a text of up to T tokens."""
    batch = dict(texts()(n, tokens))
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(n), last] = SPECIAL["eos_token_id"]  # where CLIP pools
    return batch | {"pixel_values": torch.randn(n, 3, 2 * PATCH, 2 * PATCH)}


def similarity_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss of how alike each pair's image and text are, the diagonal of all logits."""
    return curved(model(**batch).logits_per_image.diagonal()[:, None])


def embedding_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss of each pair's embeddings."""
    image, text = model(**batch)
    return curved(torch.cat([image, text], 1)) + curved((image * text).sum(1, keepdim=True))


def lora() -> nn.Module:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3)
    with warnings.catch_warnings():  # peft asks transformers for what it renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model: nn.Module = peft.get_peft_model(llama(), config)
    return model


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=llama_config(),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_id=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration(config)


def illustrated(images: list[int]) -> Callable[[int, int], Batch]:
    """Return a function that makes N texts with images in them, as many as given, in turns."""

    def batch(n: int, tokens: int) -> Batch:
        counts = torch.tensor(images * n)[:n]
        patches = 4 * counts  # two by two patches an image, without the class token
        total = tokens + int(patches.max())
        places = torch.arange(total)
        ids = different(n, total, IMAGE_TOKEN)
        ids[(places >= 1) & (places <= patches[:, None])] = IMAGE_TOKEN
        mask = (places < tokens - torch.arange(n)[:, None] % 2 + patches[:, None]).long()
        return {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "pixel_values": torch.randn(int(counts.sum()), 3, 2 * PATCH, 2 * PATCH),
            "owners": torch.arange(n).repeat_interleave(counts),
        }

    return batch


def illustrated_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of each text over its next tokens that are words."""
    given = {name: value for name, value in batch.items() if name != "owners"}
    logits = model(**given).logits
    words = next_mask(batch) * (batch["input_ids"][:, 1:] != IMAGE_TOKEN)
    return text_losses(logits[:, :-1], batch["input_ids"][:, 1:], words)


KEY_BIASES = ("*.k_proj.bias",)
"""A constant added to all scores of a query leaves its softmax as it is."""

ALL_IMAGES = {"model.vision_tower*": "owners", "model.multi_modal_projector*": "owners"}
"""Rows of these modules are images; whose they are, the batch says."""

POSITIONS = {"model.vision_tower.embeddings.position_embedding": "owners"}
"""One row for all images; how many they are, nothing else says. Where all texts have as many, the
rows of other modules tell themselves."""


def illustrated_family(images: list[int], row_owner: Mapping[str, str] | None = None) -> Family:
    """Return LLaVA on texts with so many images, in turns."""
    return Family(
        llava,
        illustrated(images),
        illustrated_losses,
        zero=KEY_BIASES,
        # Images are read off before the last layer of the vision tower.
        unused=("model.vision_tower.encoder.layers.1.*", "model.vision_tower.post_layernorm.*"),
        options={"row_owner": row_owner or {}},
    )


PAIRS = {
    "clip": Family(clip, images_and_texts, similarity_losses, zero=KEY_BIASES),
    "clip_logits": Family(
        clip,
        images_and_texts,
        similarity_losses,
        zero=KEY_BIASES,
        options={"exclude": "logit_scale,*.class_embedding"},
    ),
    "clip_embeddings": Family(clip_embeddings, images_and_texts, embedding_losses, zero=KEY_BIASES),
    "llama_lora": decoder(lora, left=True),
    "llava": illustrated_family([1]),
    "llava_two_images": illustrated_family([2], POSITIONS),
    "llava_some_images": illustrated_family([2, 1, 3], ALL_IMAGES),
    # Four images for four texts, but not one for each.
    "llava_four_images": illustrated_family([2, 0, 1, 1], ALL_IMAGES),
    "llava_two_images_not_owned": illustrated_family([2]),
    "llava_four_images_not_owned": illustrated_family([2, 0, 1, 1]),
}
