from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch
from torch import nn

from ghost_core import SamplerRegistry
from ghost_core.testing import (
    GradientHolder,
    assert_within,
    check_sampler,
    per_sample_gradients,
)
from ghost_core.tracking import Claim
from ghost_layers.transformers import TRANSFORMERS_NORMS, class_names

pytest.importorskip("transformers")

FLOAT32_INSIDE = 1e-6
"""These multiply by `weight.float()`, so that autograd adds up in float32 whatever the dtype."""

ONE_OF_EACH = [
    ("llama.LlamaRMSNorm", 1e-9),
    ("llama4.Llama4TextRMSNorm", 1e-9),
    ("t5.T5LayerNorm", 1e-9),
    ("olmo2.Olmo2RMSNorm", 1e-9),
    ("gemma.GemmaRMSNorm", FLOAT32_INSIDE),
    ("gemma3n.Gemma3nRMSNorm", FLOAT32_INSIDE),
    ("helium.HeliumRMSNorm", FLOAT32_INSIDE),
    ("moshi.MoshiRMSNorm", FLOAT32_INSIDE),
    ("muse_spark.MuseSparkTextCenteredRMSNorm", FLOAT32_INSIDE),
    ("cohere.CohereLayerNorm", FLOAT32_INSIDE),
]


def find(name: str) -> type[nn.Module]:
    """Return a class by dotted name, or skip."""
    module, _, kind = name.rpartition(".")
    try:
        found: type[nn.Module] = getattr(import_module(module), kind)
    except (ImportError, AttributeError):
        pytest.skip(f"this version of transformers has no {name}")
    return found


def make(name: str, shape: int | tuple[int, ...] = 6) -> nn.Module:
    kind = find(name)
    # Not all have a default; a large one shows that it is not left out.
    module = kind(shape, **({"eps": 0.1} if "eps" in inspect.signature(kind).parameters else {}))
    module.weight.data.uniform_(-1, 1)
    return module


def dotted(name: str) -> str:
    """Return the dotted name of `model.Class`."""
    return class_names(name)[0]


@pytest.mark.stress  # one of each formula is below; test_formula.py compares every class
@pytest.mark.parametrize("name", TRANSFORMERS_NORMS)
def test_every_listed_class(name: str) -> None:
    model = nn.Sequential(make(name)).double()
    registry = SamplerRegistry([Claim(name, TRANSFORMERS_NORMS[name], "test")])
    inputs, slope = torch.randn(2, 3, 6, 2, 6, dtype=torch.float64)
    with GradientHolder(model, registry=registry) as engine, engine.batch(range(3)) as batch:
        outputs = model(inputs)
        outputs.backward(slope)
    expected = per_sample_gradients(model, (model(inputs) * slope).flatten(1).sum(1))
    held = batch.result.materialize()
    assert held.keys() == expected.keys()
    for local, gradient in expected.items():
        assert gradient.any()
        scale = gradient.norm(dim=1, keepdim=True)
        assert_within(held[local], gradient, scale, FLOAT32_INSIDE, f"{name}.{local}")


@pytest.mark.parametrize(("name", "tolerance"), ONE_OF_EACH)
def test_one_of_each_formula(name: str, tolerance: float) -> None:
    module, sampler = make(dotted(name)), TRANSFORMERS_NORMS[dotted(name)]
    check_sampler(sampler, module, torch.randn(3, 2, 6), tolerance=tolerance)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *ONE_OF_EACH[:1],
        *(pytest.param(*each, marks=pytest.mark.stress) for each in ONE_OF_EACH[1:]),
    ],
)
def test_without_tokens_and_used_twice(name: str, tolerance: float) -> None:
    module, sampler = make(dotted(name)), TRANSFORMERS_NORMS[dotted(name)]
    check_sampler(sampler, module, torch.randn(3, 6), uses=2, tolerance=tolerance)


def test_weight_with_two_axes() -> None:
    name = dotted("cohere.CohereLayerNorm")
    inputs = torch.randn(3, 4, 2, 6)
    check_sampler(TRANSFORMERS_NORMS[name], make(name, (2, 6)), inputs, tolerance=FLOAT32_INSIDE)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_images(data_format: str) -> None:
    name = dotted("convnext.ConvNextLayerNorm")
    module = find(name)(5, data_format=data_format)
    inputs = torch.randn(3, 5, 2, 5)
    check_sampler(TRANSFORMERS_NORMS[name], module, inputs)
    check_sampler(TRANSFORMERS_NORMS[name], module, inputs, uses=2)


@pytest.mark.parametrize("name", ["llama.LlamaRMSNorm", "olmo2.Olmo2RMSNorm", "t5.T5LayerNorm"])
def test_rounding_of_the_forward_is_reproduced(name: str, registry: SamplerRegistry) -> None:
    module = make(dotted(name)).bfloat16()
    inputs, slope = torch.randn(2, 3, 6, dtype=torch.bfloat16)
    with GradientHolder(module, registry=registry) as engine, engine.batch(range(3)) as batch:
        module(inputs).backward(slope)
    held = batch.result.materialize()["weight"]
    # One term per sample, so that a single product is left to round.
    for n in range(3):
        part = slice(n, n + 1)
        (expected,) = torch.autograd.grad(module(inputs[part]), module.weight, slope[part])
        assert torch.equal(held[n].bfloat16(), expected)
