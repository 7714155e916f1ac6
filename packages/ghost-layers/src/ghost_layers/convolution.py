"""Samplers for convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.nn import functional

from ghost_core import (
    Call,
    Dense,
    InputFactor,
    Outer,
    PerSampleGradient,
    Record,
)
from ghost_core._torch import own_padding
from ghost_layers.affine import AffineSampler
from ghost_layers.shapes import channels_last, check_samples, only_input

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input; one entry per spatial axis.

    Attributes:
        kernel: Size of the kernel.
        stride: Step from one output position to the next.
        padding: Zeros on both sides.
        dilation: Step from one element of the kernel to the next.
        groups: Number of independent groups G.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def reach(self) -> tuple[int, ...]:
        """Extent of the kernel with its gaps."""
        return tuple(
            (size - 1) * dilation + 1
            for size, dilation in zip(self.kernel, self.dilation, strict=True)
        )

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the number of output positions along each axis."""
        axes = zip(spatial, self.padding, self.reach, self.stride, strict=True)
        return tuple((size + 2 * pad - reach) // stride + 1 for size, pad, reach, stride in axes)


@dataclass(frozen=True)
class Patches(InputFactor):
    """The input as a convolution sees it: a patch of it per output position.

    The patches overlap, so they are built in `dense` only; all else is a convolution.

    Attributes:
        x: `[N, G·c, *spatial]`, with c channels in a group; d is c times the size of the kernel.
        geometry: How the convolution moves over it.
    """

    x: Tensor
    geometry: Geometry
    transposed = False
    mixes_anew: ClassVar[bool] = True

    @property
    def groups(self) -> int:
        """Number of independent groups G."""
        return self.geometry.groups

    def dense(self) -> Tensor:
        """Copy the patches out, `[N, T, G, d]`."""
        geometry, rank = self.geometry, len(self.geometry.kernel)
        sides = [side for pad in reversed(geometry.padding) for side in (pad, pad)]
        windows = functional.pad(self.x, sides)
        moves = zip(geometry.reach, geometry.stride, geometry.dilation, strict=True)
        for axis, (reach, stride, dilation) in enumerate(moves, start=2):
            windows = windows.unfold(axis, reach, stride)[..., ::dilation]
        windows = windows.unflatten(1, (self.groups, -1))  # [N, G, c, *out, *kernel]
        windows = windows.movedim((1, 2), (rank + 1, rank + 2))  # [N, *out, G, c, *kernel]
        patches: Tensor = windows.flatten(1, rank).flatten(3)
        return patches

    def mix(self, weight: Tensor) -> Tensor:
        """Convolve with the weight as the kernel: `[G, k, d]` to `[N, T, G, k]`."""
        geometry = self.geometry
        channels = self.x.shape[1] // self.groups
        kernel = weight.reshape(-1, channels, *geometry.kernel)
        outputs = _CONVOLUTIONS[len(geometry.kernel)](
            self.x.to(weight.dtype),
            kernel,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
        )
        return _by_group(outputs, self.groups)

    def outer(self, grad: Tensor) -> Tensor:
        """Correlate each sample with its gradient, `[N, T, G, p]` to `[N, G, p, d]`.

        The samples become groups of a single convolution, unless there are fewer positions than
        outputs: then copying the patches out takes less than what is made of them.
        """
        n, tokens, groups, p = grad.shape
        if tokens < p or not n:
            return super().outer(grad)
        merged = self._correlate(self.x.flatten(0, 1).unsqueeze(0), grad, n)
        return merged.reshape(n, groups, p, -1)

    def sum_outer(self, grad: Tensor) -> Tensor:
        """Form the weight gradient of the batch, `[N, T, G, p]` to `[G, p, d]`."""
        return self._correlate(self.x, grad, 1).reshape(*grad.shape[2:], -1)

    def _correlate(self, x: Tensor, grad: Tensor, merged: int) -> Tensor:
        """Return the weight gradient of a convolution of which `merged` samples are groups."""
        geometry = self.geometry
        outputs = grad.permute(0, 2, 3, 1)  # [N, G, p, T]
        outputs = outputs.reshape(
            len(x), merged * grad.shape[2:].numel(), *geometry.output_size(x.shape[2:])
        )
        groups = merged * geometry.groups
        size = (outputs.shape[1], x.shape[1] // groups, *geometry.kernel)
        gradient: Tensor
        _, gradient, _ = torch.ops.aten.convolution_backward(
            outputs,
            x.to(grad.dtype),
            grad.new_empty(1).expand(size),
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            [0] * len(geometry.kernel),
            groups,
            (False, True, False),
        )
        return gradient


class ConvolutionSampler(AffineSampler):
    """Per-sample gradients of `Conv1d`, `Conv2d` and `Conv3d`, for inputs `[N, c, *spatial]`."""

    methods = ("forward", "_conv_forward")

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input in the dtype that the convolution ran in."""
        module: Any = call.module
        check_samples(call, rank=len(module.kernel_size) + 2)
        if "weight" not in call.shapes:
            return {}
        kernel = tuple(call.shapes["weight"][2:])
        stride = _per_axis(module.stride, len(kernel))
        dilation = _per_axis(module.dilation, len(kernel))
        x = only_input(call).to(call.outputs[0].dtype)
        x, padding = _padded(module, x, kernel, dilation)
        return {"weight": Patches(x, Geometry(kernel, stride, padding, dilation, module.groups))}

    def weight_gradient(self, record: Any, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Pair the patches, an `InputFactor`, with the output gradient."""
        return Outer(record, _by_group(grad, record.groups), shape)

    def bias_gradient(self, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Take the output gradient, channels last."""
        return Dense(channels_last(grad))


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Split channels into groups: `[N, G·p, *spatial]` to `[N, T, G, p]`."""
    positions = channels_last(values)
    n, tokens, channels = positions.shape
    return positions.view(n, tokens, groups, channels // groups)


def _padded(
    module: Any, x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input as the kernel got it, and the zeros that the kernel put around it."""
    nothing = (0,) * len(kernel)
    if module.padding_mode != "zeros":
        sides = own_padding(module)
        return functional.pad(x, sides, mode=module.padding_mode), nothing
    if module.padding == "valid":
        return x, nothing
    if module.padding != "same":
        return x, _per_axis(module.padding, len(kernel))
    totals = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, tuple(total // 2 for total in totals)
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return functional.pad(x, sides), nothing


def _per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Give every spatial axis its value; one value stands for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values
