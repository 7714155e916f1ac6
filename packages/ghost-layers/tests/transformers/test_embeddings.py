from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from ghost_core import SamplerRegistry
from ghost_core.testing import GradientHolder, check_sampler
from ghost_layers.transformers import TRANSFORMERS_EMBEDDINGS

pytest.importorskip("transformers")

INDEX = torch.tensor([[0, 2, 6, 6], [1, 1, 2, 3], [6, 0, 2, 5]])


def make(name: str, padding: int | None) -> nn.Module:
    """Make a listed embedding, or skip."""
    module, _, kind = name.rpartition(".")
    try:
        found = getattr(import_module(module), kind)
    except (ImportError, AttributeError):
        pytest.skip(f"this version of transformers has no {name}")
    embedding: nn.Module = found(7, 3, padding, embed_scale=1.7)
    return embedding


OFTEN = ("bart", "gemma3", "m2m_100")
"""Families that the default tests import; each takes half a second."""


@pytest.mark.parametrize(
    "name",
    [
        name if name.split(".")[2] in OFTEN else pytest.param(name, marks=pytest.mark.stress)
        for name in TRANSFORMERS_EMBEDDINGS
    ],
)
def test_every_listed_class(name: str) -> None:
    check_sampler(TRANSFORMERS_EMBEDDINGS[name], make(name, 2), INDEX)


@pytest.mark.parametrize(
    "model", ["bart.BartScaledWordEmbedding", "gemma3.Gemma3TextScaledWordEmbedding"]
)
def test_used_twice_without_padding(model: str) -> None:
    family, kind = model.split(".")
    name = f"transformers.models.{family}.modeling_{family}.{kind}"
    check_sampler(TRANSFORMERS_EMBEDDINGS[name], make(name, None), INDEX, uses=2)


def test_scale_is_rounded_as_in_the_forward(registry: SamplerRegistry) -> None:
    name = "transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding"
    model = nn.Sequential(make(name, None)).bfloat16()
    model[0].embed_scale = torch.tensor(1.7)  # as where only the parameters are loaded in bfloat16
    slope = torch.randn(1, 3, 3, dtype=torch.bfloat16)
    with GradientHolder(model, registry=registry) as engine, engine.batch(range(1)) as batch:
        model(INDEX[2:, 1:]).backward(slope)
    # Rows appear once, so that a single product is left to round.
    assert torch.equal(batch.result.materialize()["0.weight"][0].bfloat16(), model[0].weight.grad)
