"""A digest of a model, for the manifest of a store."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ghost_core._torch import whole
from ghost_core.arguments import module


def model_digest(model: nn.Module) -> str:
    """Return the sha256 of all parameters and buffers with their names, shapes and dtypes.

    Give it to `GradientStore.create(..., info={"model": model_digest(model)})`, and rows of other
    weights cannot be appended later.

    Raises:
        CaptureError: If it is no model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module(model).state_dict(keep_vars=True).items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = whole(tensor.detach()).contiguous().cpu().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
