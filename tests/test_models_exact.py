"""Whole models against per-sample autograd in float64: every parameter, with padding.

The reference is found in two ways, which must agree: one autograd call per sample over one forward
pass, and one forward pass per sample.
"""

import pytest
import torch
from torch import nn

LANGUAGE_MODELS = ["gpt2", "llama"]
# N samples of T tokens. As many samples as tokens: nothing tells their axes apart by size.
SHAPES = [(5, 8), (6, 6), (1, 6)]


@pytest.fixture(params=["dots", "rows"])
def assert_exact(request, assert_dots, assert_rows):
    """Compare either engine."""
    return assert_dots if request.param == "dots" else assert_rows


EACH_WITH_ONE = pytest.mark.parametrize(
    ("name", "assert_exact"),
    [
        ("gpt2", "dots"),
        ("llama", "rows"),
        pytest.param("gpt2", "rows", marks=pytest.mark.stress),
        pytest.param("llama", "dots", marks=pytest.mark.stress),
    ],
    indirect=["assert_exact"],
)
"""Both models and both engines; by default one engine for each."""


@pytest.mark.parametrize(("n", "length"), SHAPES)
@EACH_WITH_ONE
def test_language_models(name, n, length, make_language_task, assert_exact):
    assert_exact(make_language_task(name, n, length))


@EACH_WITH_ONE
def test_language_models_with_padding_on_the_left(name, make_language_task, assert_exact):
    assert_exact(make_language_task(name, padding_side="left"))


@EACH_WITH_ONE
def test_language_models_without_verification(name, make_language_task, assert_exact):
    """Verification looks; it must not be what makes the numbers right."""
    assert_exact(make_language_task(name), verify=False)


def test_every_parameter_of_the_language_models_is_tracked(make_language_task):
    names = {name: make_language_task(name).reference().keys() for name in LANGUAGE_MODELS}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < names["gpt2"]
    assert "lm_head.weight" not in names["gpt2"]  # tied
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < names["llama"]
    assert {name: len(found) for name, found in names.items()} == {"gpt2": 28, "llama": 21}


def test_convolutions_with_in_place_activations(convolutions, assert_exact):
    assert_exact(convolutions)


def test_as_many_samples_as_channels_and_rows(make_task, assert_exact):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv1d(4, 4, 1), nn.Flatten(1, -1)
    ).double()
    inputs = torch.randn(4, 4, 4, dtype=torch.float64)
    others = torch.randn(4, 4, 4, dtype=torch.float64)
    task = make_task(
        model.eval(),
        4,
        lambda samples: model(inputs[samples]).square().sum(1),
        lambda: model(others).square().sum(1).mean(),
    )
    assert_exact(task)
