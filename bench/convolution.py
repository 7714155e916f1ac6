"""Convolutional networks: the demo's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.case import Case, Setting, Way
from bench.steps import Loss, plain, scored


def digits(setting: Setting) -> tuple[nn.Module, Loss, int]:
    """Return the demo's network, the loss of a batch of images, and N."""
    from ghost_examples.demo.convnet import new_model  # whose data sets need scikit-learn

    n = 4 if setting.tiny else 32
    images = torch.randn(n, 1, 8, 8, device=setting.device)
    labels = torch.randint(10, (n,), device=setting.device)
    model = new_model(0, str(setting.device))
    return model, lambda model: cross_entropy(model(images), labels), n


def digits_dots(setting: Setting) -> Mapping[str, Way]:
    """Make a plain step, and one scored with a direction that is there."""
    model, loss, n = digits(setting)
    return {"plain": plain(model, loss), "exact": scored(setting, model, loss, n)}


CASES = [
    Case(
        "demo_convnet",
        "the demo's ConvNet, N = 32, dots with one direction that is there",
        digits_dots,
        goals={"exact": 1.5},
        needs=("ghost_examples", "sklearn"),
    ),
]
