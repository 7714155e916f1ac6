"""Models that see images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tests.zoo.family import Batch, Family, curved
from torch import Tensor, nn

PATCH = 2


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=2 * PATCH, patch_size=PATCH, hidden_size=12, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=20, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        image_size=16, patch_size=PATCH, hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 2, 1],
        num_labels=5,
    )  # fmt: skip
    return transformers.ConvNextForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 12], depths=[1, 2], num_labels=5
    )
    model = transformers.ResNetForImageClassification(config)
    for name, statistics in model.named_buffers():
        if name.endswith("running_mean"):
            statistics.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            statistics.uniform_(0.2, 1)
    return model


def images(size: int) -> Callable[[int, int], Batch]:
    """Return a function that makes N images; how many patches T there are, the model says."""

    def batch(n: int, tokens: int) -> Batch:
        return {"pixel_values": torch.randn(n, 3, size, size)}

    return batch


def class_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss of each image's class logits."""
    return curved(model(**batch).logits)


IMAGES = {
    # Two by two patches and the class token are five tokens.
    "vit": Family(
        vit, images(2 * PATCH), class_losses, tokens=5, square=5, zero=("*.k_proj.bias",)
    ),
    # The first stage has eight by eight positions, the last one a single one, the second four.
    "convnext": Family(convnext, images(16), class_losses, tokens=64, square=4),
    "resnet": Family(resnet, images(16), class_losses, tokens=64, square=8),
}
