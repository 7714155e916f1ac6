"""The device that these tests run on: `tools/gpu.py` says which; the CPU by default."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("GHOST_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device."""
    return DEVICE
