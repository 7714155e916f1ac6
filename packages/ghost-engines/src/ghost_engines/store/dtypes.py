"""The dtypes that rows of projected gradients can have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Dtypes by name."""
