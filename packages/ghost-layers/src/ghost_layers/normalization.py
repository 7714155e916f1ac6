"""Samplers for layers that normalise their input, then scale and shift it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional

from ghost_core import (
    Call,
    Dense,
    PerSampleGradient,
    Record,
    WrongSplitError,
)
from ghost_core._torch import rank_without_samples
from ghost_core.algebra import accumulation_dtype
from ghost_layers.affine import AffineSampler
from ghost_layers.shapes import channels_last, check_samples, only_input


@dataclass(frozen=True)
class Normalized(Record):
    """The input of a normalisation, and how to normalise it again.

    Attributes:
        x: The input, `[N, ...]`.
        normalize: Makes of it what the layer scales.
    """

    x: Tensor
    normalize: Callable[[Tensor], Tensor]

    def times(self, grad: Tensor) -> Tensor:
        """Return the normalised input times a gradient, both of its shape."""
        values = self.normalize(self.x)
        own = values is not self.x and values.dtype == torch.promote_types(values.dtype, grad.dtype)
        # Memory of its own is used again: to get more of it takes longer than to multiply.
        return values.mul_(grad) if own else values * grad


@dataclass(frozen=True)
class Standardized(Record):
    """The input of a normalisation by statistics that are fixed.

    Attributes:
        x: The input, `[N, C, ...]`.
        mean: Running mean, one row for every sample, `[N, C]`.
        variance: Running variance, `[N, C]`.
        eps: What is added to the variance.
    """

    x: Tensor
    mean: Tensor
    variance: Tensor
    eps: float

    def times(self, grad: Tensor) -> Tensor:
        """Return the normalised input times a gradient, both of its shape."""
        dtype = accumulation_dtype(self.x, grad)
        shape = (*self.mean.shape, *[1] * (self.x.dim() - 2))
        mean, variance = self.mean.to(dtype).reshape(shape), self.variance.to(dtype).reshape(shape)
        return (self.x.to(dtype) - mean).mul_(torch.rsqrt(variance + self.eps)).mul_(grad)


class ScaleSampler(AffineSampler):
    """Per-sample gradients of `y = weight · normalized(x) + bias`, features on the last axes."""

    @abstractmethod
    def normalized(self, call: Call) -> Normalized | Standardized:
        """Return what the weight was multiplied by."""

    def terms(self, values: Tensor, shape: Size) -> Tensor:
        """Fold the axes that parameters are shared over into terms.

        Args:
            values: `[N, ...]`, of the output's shape.
            shape: Shape of the parameter.

        Returns:
            `[N, T, *shape]`.
        """
        shared = values.dim() - len(shape)
        if shared == 2:
            return values
        rows = values.shape
        return values.reshape(rows[0], rows[1:shared].numel(), *shape)

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input."""
        check_samples(call, rank=1 + max(map(len, call.shapes.values())))
        return {"weight": self.normalized(call)} if "weight" in call.shapes else {}

    def weight_gradient(self, record: Any, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Multiply the normalised input by the output gradient."""
        return Dense(self.terms(record.times(grad.to(accumulation_dtype(grad))), shape))

    def bias_gradient(self, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Take the output gradient as it is."""
        return Dense(self.terms(grad, shape))


class ChannelScaleSampler(ScaleSampler):
    """The same with features on the second axis, `[N, C, ...]`."""

    def terms(self, values: Tensor, shape: Size) -> Tensor:
        """Fold the axes behind the channels: `[N, C, ...]` to `[N, T, C]`."""
        return channels_last(values)


class LayerNormSampler(ScaleSampler):
    """Per-sample gradients of `LayerNorm`, for inputs `[N, ..., *normalized_shape]`."""

    def normalized(self, call: Call) -> Normalized:
        """Keep the input."""
        module: Any = call.module
        shape, eps = module.normalized_shape, module.eps
        return Normalized(only_input(call), lambda x: _standardized(_widened(x), shape, eps))


class RMSNormSampler(ScaleSampler):
    """Per-sample gradients of `torch.nn.RMSNorm`, for inputs `[N, ..., *normalized_shape]`."""

    parameters = ("weight",)

    def normalized(self, call: Call) -> Normalized:
        """Keep the input."""
        module: Any = call.module
        x: Tensor = only_input(call)
        shape, eps = module.normalized_shape, module.eps
        if eps is None:
            eps = torch.finfo(accumulation_dtype(x)).eps
        return Normalized(x, lambda x: functional.rms_norm(_widened(x), shape, eps=eps))


class GroupNormSampler(ChannelScaleSampler):
    """Per-sample gradients of `GroupNorm`, for inputs `[N, C, ...]`."""

    def normalized(self, call: Call) -> Normalized:
        """Keep the input."""
        module: Any = call.module
        groups, eps = module.num_groups, module.eps
        return Normalized(
            only_input(call), lambda x: functional.group_norm(_widened(x), groups, eps=eps)
        )


class InstanceNormSampler(ChannelScaleSampler):
    """Per-sample gradients of `InstanceNorm1d`, `2d` and `3d`, for inputs `[N, C, *spatial]`."""

    methods = ("forward", "_apply_instance_norm")

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input."""
        check_samples(call, rank=1 + rank_without_samples(call.module))
        return super().record(call)

    def normalized(self, call: Call) -> Normalized | Standardized:
        """Keep the input, and the running statistics where they are used."""
        module: Any = call.module
        if module.track_running_stats and not module.training:
            return _by_running_statistics(module, only_input(call))
        eps = module.eps
        return Normalized(
            only_input(call), lambda x: functional.instance_norm(_widened(x), eps=eps)
        )


class BatchNormSampler(ChannelScaleSampler):
    """Per-sample gradients of `BatchNorm1d`, `2d` and `3d` in evaluation, for `[N, C, ...]`."""

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input, or refuse statistics of the batch."""
        module: Any = call.module
        if module.training or module.running_mean is None:
            raise WrongSplitError(
                f"gradients cannot be split by sample: {call.label} normalises over the batch",
                reason="every sample's output depends on all others",
                remedy="put BatchNorm layers with running statistics into evaluation mode, or use "
                "GroupNorm",
            )
        return super().record(call)

    def normalized(self, call: Call) -> Standardized:
        """Keep the input and the running statistics."""
        return _by_running_statistics(call.module, only_input(call))


def _standardized(x: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
    """Return a layer norm's input as it scales it."""
    # With a weight of ones torch's kernel for CPUs takes half the time, and computes the same.
    ones = x.new_ones(shape) if x.device.type == "cpu" else None
    return functional.layer_norm(x, shape, ones, eps=eps)


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))


def _by_running_statistics(module: Any, x: Tensor) -> Standardized:
    shape = x.shape[:2]
    return Standardized(
        x, module.running_mean.expand(shape), module.running_var.expand(shape), module.eps
    )
