from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ghost_core import Dense, Outer, PastCall, SamplerRegistry, WrongSplitError
from ghost_core.testing import GradientHolder, assert_within, check_sampler
from ghost_core.tracking import Claim, dotted_name
from ghost_layers import ConvolutionSampler, Geometry, Patches

ONE, TWO, THREE = (3, 4, 7), (3, 4, 6, 5), (3, 2, 4, 3, 5)


def registry(kind: type[nn.Module]) -> SamplerRegistry:
    return SamplerRegistry([Claim(dotted_name(kind), ConvolutionSampler, "test")])


Case = tuple[type[nn.Module], tuple[int, ...], tuple[Any, ...], dict[str, Any]]
CASES: list[Case] = [
    (nn.Conv1d, ONE, (4, 6, 3), {"groups": 2, "stride": 2, "padding": 1, "bias": False}),
    (nn.Conv2d, TWO, (4, 3, (3, 2)), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    (nn.Conv2d, TWO, (4, 3, (2, 3)), {"padding": "same", "padding_mode": "reflect"}),
    # Fewer positions than outputs, and as many positions as samples.
    (nn.Conv2d, TWO, (4, 9, (5, 4)), {}),
    (nn.Conv2d, (4, 3, 4, 4), (3, 2, 3), {}),
    (nn.Conv3d, THREE, (2, 4, (1, 2, 3)), {"groups": 2, "stride": (2, 1, 2), "padding": (0, 1, 1)}),
]
MORE_CASES: list[Case] = [
    (nn.Conv1d, ONE, (4, 4, 2), {"padding": "same", "dilation": 3, "groups": 4}),
    (nn.Conv1d, (3, 4, 1), (4, 3, 1), {}),
    (nn.Conv2d, TWO, (4, 3, 3), {}),
    (nn.Conv2d, TWO, (4, 3, 1), {"stride": 2}),
    (nn.Conv2d, TWO, (4, 3, (2, 3)), {"padding": "same", "dilation": (1, 2)}),
    (nn.Conv2d, TWO, (4, 3, 3), {"padding": (2, 1), "padding_mode": "replicate", "stride": 2}),
    (nn.Conv1d, ONE, (4, 3, 3), {}),
    (nn.Conv1d, ONE, (4, 3, 4), {"padding": "same"}),
    (nn.Conv1d, ONE, (4, 3, 3), {"padding": 2, "padding_mode": "circular"}),
    (nn.Conv2d, TWO, (4, 8, 3), {"groups": 4, "padding": 1}),
    (nn.Conv2d, TWO, (4, 4, 3), {"groups": 2, "stride": 3}),
    (nn.Conv2d, TWO, (4, 3, 3), {"padding": "valid"}),
    (nn.Conv2d, TWO, (4, 3, (3, 5)), {"padding": "same"}),
    (nn.Conv2d, TWO, (4, 3, 3), {"padding": (1, 2), "padding_mode": "zeros"}),
    (nn.Conv2d, TWO, (4, 3, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    (nn.Conv2d, TWO, (4, 3, 3), {"padding": (2, 1), "padding_mode": "circular"}),
    (nn.Conv3d, THREE, (2, 3, 2), {}),
    (nn.Conv3d, THREE, (2, 2, 2), {"padding": "same"}),
]
"""Other combinations of the same options; the table of cases has each alone."""


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kind", "shape", "arguments", "options"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.stress) for case in MORE_CASES)],
)
def test_convolution(
    kind: type[nn.Module],
    shape: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    check_sampler(ConvolutionSampler, kind(*arguments, **options), torch.randn(shape))


def test_convolution_used_twice() -> None:
    check_sampler(ConvolutionSampler, nn.Conv2d(2, 3, 2), torch.randn(3, 2, 4, 3), uses=2)


@pytest.mark.parametrize(
    "padding_mode", [pytest.param("zeros", marks=pytest.mark.stress), "reflect"]
)
def test_channels_last(padding_mode: str) -> None:
    module = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode=padding_mode)
    module = module.to(memory_format=torch.channels_last)
    inputs = torch.randn(TWO).to(memory_format=torch.channels_last)
    check_sampler(ConvolutionSampler, module, inputs)


def test_input_by_keyword() -> None:
    check_sampler(ConvolutionSampler, nn.Conv1d(4, 3, 2), input=torch.randn(ONE))


def test_attributes_changed_after_construction() -> None:
    module = nn.Conv2d(4, 3, 3)
    module.stride, module.padding, module.dilation = (2, 1), (2, 2), (1, 2)
    check_sampler(ConvolutionSampler, module, torch.randn(TWO))


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv1d(3, 3, 2), (3, 5)), (nn.Conv2d(3, 3, 2), (3, 4, 4))]
)
def test_unbatched_input_is_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    with (
        GradientHolder(nn.Sequential(module), registry=registry(type(module))) as engine,
        pytest.raises(WrongSplitError, match=r"(?s)0 returned one sample of shape .*Remedy"),
        engine.batch(range(shape[0])),
    ):
        engine.model(torch.randn(shape))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bias_takes_the_gradient_without_a_copy(memory_format: torch.memory_format) -> None:
    grad = torch.randn(3, 2, 4, 5).to(memory_format=memory_format)
    call = PastCall("layer", {"bias": torch.Size([2])})
    gradients = ConvolutionSampler().gradients(call, {}, [grad])
    bias = gradients["bias"]
    assert list(gradients) == ["bias"]
    assert isinstance(bias, Dense)
    assert bias.terms.data_ptr() == grad.data_ptr()
    torch.testing.assert_close(bias.materialize(), grad.sum((2, 3)))


GEOMETRY = Geometry((2, 3), (2, 1), (1, 2), (1, 2), 2)


def patches(n: int, dtype: torch.dtype = torch.float64) -> Patches:
    return Patches(torch.randn(n, 4, 6, 7, dtype=dtype), GEOMETRY)


@pytest.mark.parametrize("p", [1, 50])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_operations_agree_with_the_patches_themselves(n: int, p: int) -> None:
    factor = patches(n)
    dense = factor.dense()
    weight = torch.randn(2, 5, 12, dtype=torch.float64)
    grad = torch.randn(n, dense.shape[1], 2, p, dtype=torch.float64)
    mixed = torch.einsum("ntgd,gkd->ntgk", dense, weight)
    outer = torch.einsum("ntgp,ntgd->ngpd", grad, dense)
    assert_within(factor.mix(weight), mixed, 10.0, 1e-12)
    assert_within(factor.outer(grad), outer, 10.0, 1e-12)
    assert_within(factor.sum_outer(grad), outer.sum(0), 10.0, 1e-12)


def test_patches_are_those_of_unfold() -> None:
    factor = patches(3)
    unfolded = functional.unfold(
        factor.x, GEOMETRY.kernel, GEOMETRY.dilation, GEOMETRY.padding, GEOMETRY.stride
    )
    torch.testing.assert_close(factor.dense().flatten(2).mT, unfolded, rtol=0, atol=0)


def test_autocast_keeps_what_the_kernel_saw() -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 3))
    inputs = torch.randn(3, 4, 5, 5)
    with (
        GradientHolder(model, registry=registry(nn.Conv2d)) as engine,
        engine.batch(range(3)) as batch,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        outputs.float().square().sum().backward()
    (gradient,) = batch.result.gradients("0.weight")
    assert isinstance(gradient, Outer)
    assert isinstance(gradient.factor, Patches)
    assert gradient.factor.x.dtype == torch.bfloat16
    assert torch.equal(gradient.factor.x, inputs.bfloat16())
    assert gradient.materialize().dtype == torch.float32
    expected = model[0].weight.grad
    assert expected is not None
    assert_within(gradient.sum(), expected, expected.norm(), 1e-2)
