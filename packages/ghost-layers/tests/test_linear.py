from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ghost_core import Dense, Outer, PastCall, SamplerRegistry, Tokens, WrongSplitError
from ghost_core.testing import GradientHolder, check_sampler
from ghost_layers import Conv1DSampler, LinearSampler

SHAPES = [(5, 4), (4, 4, 4)]
MORE_SHAPES = [
    pytest.param(shape, marks=pytest.mark.stress)
    for shape in [(4, 3, 4), (3, 4, 4), (2, 3, 2, 2, 4)]
]
"""Other numbers of tokens; the table of cases has these, too."""


@pytest.mark.parametrize("shape", [*SHAPES, *MORE_SHAPES])
def test_linear(shape: tuple[int, ...]) -> None:
    check_sampler(LinearSampler, nn.Linear(4, 3), torch.randn(shape))


@pytest.mark.parametrize(
    "shape", [SHAPES[0], pytest.param(SHAPES[1], marks=pytest.mark.stress), *MORE_SHAPES]
)
def test_linear_without_bias(shape: tuple[int, ...]) -> None:
    check_sampler(LinearSampler, nn.Linear(4, 3, bias=False), torch.randn(shape))


def test_linear_used_twice() -> None:
    check_sampler(LinearSampler, nn.Linear(4, 3), torch.randn(3, 2, 4), uses=2)


def test_input_by_keyword() -> None:
    check_sampler(LinearSampler, nn.Linear(4, 3), input=torch.randn(3, 2, 4))


def test_strided_input() -> None:
    check_sampler(LinearSampler, nn.Linear(4, 3), torch.randn(3, 4, 2).mT)


def test_output_projection_of_multihead_attention() -> None:
    check_sampler(LinearSampler, NonDynamicallyQuantizableLinear(4, 3), torch.randn(3, 2, 4))


def test_transformers_conv1d() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    check_sampler(Conv1DSampler, pytorch_utils.Conv1D(3, 4), torch.randn(3, 2, 4), uses=2)
    check_sampler(Conv1DSampler, pytorch_utils.Conv1D(3, 4), x=torch.randn(3, 4))


def test_falcon_linear() -> None:
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    check_sampler(LinearSampler, falcon.FalconLinear(4, 3), torch.randn(3, 2, 4))


def test_autocast_keeps_what_the_kernel_saw(registry: SamplerRegistry) -> None:
    model, inputs = nn.Linear(4, 3), torch.randn(3, 2, 4)
    with GradientHolder(model, registry=registry) as engine, engine.batch(range(3)) as batch:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        outputs.float().square().sum().backward()
    (gradient,) = batch.result.gradients("weight")
    assert isinstance(gradient, Outer)
    assert isinstance(gradient.factor, Tokens)
    assert torch.equal(gradient.factor.x.squeeze(2), inputs.bfloat16())
    assert gradient.materialize().dtype == torch.float32
    torch.testing.assert_close(gradient.sum(), model.weight.grad, rtol=2e-2, atol=2e-2)


def test_bias_takes_the_gradient_without_a_copy() -> None:
    grad = torch.randn(3, 2, 3)
    call = PastCall("layer", {"bias": torch.Size([3])})
    gradients = LinearSampler().gradients(call, {}, [grad])
    bias = gradients["bias"]
    assert list(gradients) == ["bias"]
    assert isinstance(bias, Dense)
    assert bias.terms.data_ptr() == grad.data_ptr()


def test_one_sample_without_its_axis_is_refused(registry: SamplerRegistry) -> None:
    model = nn.Linear(4, 4)
    with (
        GradientHolder(model, registry=registry) as engine,
        pytest.raises(WrongSplitError, match="without an axis for samples"),
        engine.batch(range(4)),
    ):
        model(torch.randn(4))
