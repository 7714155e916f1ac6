from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ghost_core import GradientSampler, SamplerRegistry, WrongSplitError
from ghost_core.testing import (
    GradientHolder,
    assert_within,
    check_sampler,
    per_sample_gradients,
)
from ghost_core.tracking import Claim, dotted_name
from ghost_layers import (
    BatchNormSampler,
    GroupNormSampler,
    InstanceNormSampler,
    LayerNormSampler,
    RMSNormSampler,
)


def shuffled(module: nn.Module) -> nn.Module:
    """Give parameters and statistics values that are not ones and zeros."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + 0.5 * (name == "running_var"))
    return module


Case = tuple[type[GradientSampler], nn.Module, tuple[int, ...]]
CASES: list[Case] = [
    (LayerNormSampler, nn.LayerNorm(4, eps=0.3), (3, 2, 2, 4)),
    (LayerNormSampler, nn.LayerNorm((2, 3)), (3, 2, 2, 3)),
    (RMSNormSampler, nn.RMSNorm(4, eps=0.3), (5, 4)),
    (GroupNormSampler, nn.GroupNorm(1, 4, eps=0.3), (3, 4, 2, 3)),
    (BatchNormSampler, nn.BatchNorm2d(4, eps=0.3).eval(), (3, 4, 2, 3)),
    (BatchNormSampler, nn.SyncBatchNorm(4).eval(), (3, 4, 5)),
]
MORE_CASES: list[Case] = [
    (LayerNormSampler, nn.LayerNorm(4), (5, 4)),
    (LayerNormSampler, nn.LayerNorm(4, bias=False), (4, 4, 4)),
    (RMSNormSampler, nn.RMSNorm((2, 3)), (3, 2, 2, 3)),
    (GroupNormSampler, nn.GroupNorm(2, 4), (5, 4)),
    (BatchNormSampler, nn.BatchNorm1d(4).eval(), (3, 4)),
    (LayerNormSampler, nn.LayerNorm(4), (3, 2, 4)),
    (LayerNormSampler, nn.LayerNorm((2, 3)), (3, 2, 3)),
    (RMSNormSampler, nn.RMSNorm(4), (3, 2, 4)),
    (GroupNormSampler, nn.GroupNorm(2, 4), (3, 4, 4)),
    (GroupNormSampler, nn.GroupNorm(4, 4), (2, 4, 2, 3, 2)),
    (BatchNormSampler, nn.BatchNorm1d(4).eval(), (3, 4, 5)),
    (BatchNormSampler, nn.BatchNorm3d(2).eval(), (3, 2, 2, 3, 2)),
]
"""The same in other shapes; most are used twice below, and the table of cases has each."""


@pytest.mark.parametrize(
    ("sampler", "module", "shape"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.stress) for case in MORE_CASES)],
)
def test_normalization(
    sampler: type[GradientSampler], module: nn.Module, shape: tuple[int, ...]
) -> None:
    check_sampler(sampler, shuffled(module), 3 * torch.randn(shape) + 1)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.InstanceNorm2d(4, affine=True, eps=0.3), (3, 4, 2, 3)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 2, 3)),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), (3, 4, 5)),
        *(  # along other axes; evaluation alone changes nothing
            pytest.param(*each, marks=pytest.mark.stress)
            for each in (
                (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
                (nn.InstanceNorm3d(2, affine=True), (3, 2, 2, 3, 2)),
                (nn.InstanceNorm1d(4, affine=True).eval(), (3, 4, 5)),
            )
        ),
    ],
)
def test_instance_norm(module: nn.Module, shape: tuple[int, ...]) -> None:
    def refuse_no_sample(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        if not len(args[0]):
            raise ValueError("no samples")

    # torch raises IndexError there, which check_sampler does not take for a refusal.
    module.register_forward_pre_hook(refuse_no_sample)
    check_sampler(InstanceNormSampler, shuffled(module), 3 * torch.randn(shape) + 1)


@pytest.mark.parametrize(
    ("sampler", "module", "shape"),
    [
        (LayerNormSampler, nn.LayerNorm(4), (3, 2, 4)),
        (RMSNormSampler, nn.RMSNorm(4), (3, 2, 4)),
        (GroupNormSampler, nn.GroupNorm(2, 4), (3, 4, 2)),
        (BatchNormSampler, nn.BatchNorm1d(4).eval(), (3, 4, 5)),
    ],
)
def test_used_twice(
    sampler: type[GradientSampler], module: nn.Module, shape: tuple[int, ...]
) -> None:
    check_sampler(sampler, shuffled(module), torch.randn(shape), uses=2)


def test_channels_last() -> None:
    # torch crashes where it makes a channels-last GroupNorm's weight gradient without its input's,
    # as check_sampler would ask it to.
    module = shuffled(nn.GroupNorm(2, 4)).double()
    inputs = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    expected = per_sample_gradients(module, module(inputs).square().flatten(1).sum(1))
    with holder(module, GroupNormSampler) as engine, engine.batch(range(3)) as batch:
        module(inputs.to(memory_format=torch.channels_last)).square().sum().backward()
    for name, held in batch.result.materialize().items():
        assert expected[name].any()
        assert_within(held, expected[name], expected[name].norm(dim=1, keepdim=True))


def test_rms_norm_by_keyword() -> None:
    check_sampler(RMSNormSampler, nn.RMSNorm(4), x=torch.randn(3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_default_epsilon_of_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    module = nn.RMSNorm(4).to(dtype)
    inputs = torch.randn(3, 2, 4, dtype=dtype) / 1000  # small enough for epsilon to matter
    with holder(module, RMSNormSampler) as engine, engine.batch(range(3)) as batch:
        output = module(inputs)
        output.backward(torch.ones_like(output))
    held = batch.result.materialize()["weight"]
    torch.testing.assert_close(held, output.double().sum(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval(), nn.SyncBatchNorm(4)],
)
@pytest.mark.parametrize("layers", ["*", "bias"])
def test_statistics_of_the_batch_are_refused(module: nn.Module, layers: str) -> None:
    with (
        holder(module, BatchNormSampler, layers=layers, verify=False) as engine,
        pytest.raises(WrongSplitError, match=r"(?s)normalises over the batch.*evaluation mode"),
        engine.batch(range(3)),
    ):
        module(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("sampler", "module", "shape"),
    [
        (LayerNormSampler, nn.LayerNorm((3, 2)), (3, 2)),
        (InstanceNormSampler, nn.InstanceNorm1d(3, affine=True), (3, 5)),
        (InstanceNormSampler, nn.InstanceNorm2d(3, affine=True), (3, 5, 2)),
    ],
)
def test_unbatched_input_is_refused(
    sampler: type[GradientSampler], module: nn.Module, shape: tuple[int, ...]
) -> None:
    with (
        holder(module, sampler, verify=False) as engine,
        pytest.raises(WrongSplitError, match="without an axis for samples"),
        engine.batch(range(3)),
    ):
        module(torch.randn(shape))


def holder(module: nn.Module, sampler: type[GradientSampler], **options: Any) -> GradientHolder:
    registry = SamplerRegistry([Claim(dotted_name(type(module)), sampler, "test")])
    return GradientHolder(module, registry=registry, **options)
