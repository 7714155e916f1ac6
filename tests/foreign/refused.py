"""The patterns that have no gradients by sample, by name, with what the refusal says."""

from __future__ import annotations

REFUSED: dict[str, str] = {
    "resnet_training": "norm normalises over the batch",
}
