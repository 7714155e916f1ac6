"""Samplers for the layers of timm, which is never imported here.

They are known by name, and each is compared with autograd before its sampler is used. A class that
computes something else, in another version of timm or with other options, is no error: it is run
again for its gradients, as a module is that nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import (
    Call,
    Dense,
    GradientSampler,
    PastCall,
    PerSampleGradient,
    Record,
    WrongSplitError,
)
from ghost_core._torch import start_of_backward
from ghost_core.algebra import accumulation_dtype
from ghost_layers.convolution import ConvolutionSampler, Geometry, Patches
from ghost_layers.linear import LinearSampler
from ghost_layers.normalization import (
    BatchNormSampler,
    ChannelScaleSampler,
    GroupNormSampler,
    LayerNormSampler,
    Normalized,
    ScaleSampler,
    Standardized,
)
from ghost_layers.replay import why_not_copied
from ghost_layers.shapes import check_samples, only_input
from ghost_layers.transformers import FormulaChecked, ImageLayerNormSampler, Random, other_formula

_ACTIVATIONS = (
    nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh,
)  # fmt: skip
"""Classes that compute each element from itself, without parameters and random numbers."""


class TimmSampler(FormulaChecked):
    """Mixed into a sampler, before its base: leaves modules of other formulas to be run again."""

    def unfit(self, module: nn.Module) -> str | None:
        """Say how a module differs from what the sampler was written for."""
        return other_formula(self, module)

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse what the sampler's base refuses."""
        return super(FormulaChecked, self).refuse(module)


class TimmLinearSampler(TimmSampler, LinearSampler):
    """Per-sample gradients of `Linear`, for inputs `[N, ..., d]`."""

    def example(self, module: Any, random: Random) -> Tensor:
        """Return two samples of three tokens."""
        return random(*self.example_shape, module.in_features)


class TimmLayerNormSampler(TimmSampler, LayerNormSampler):
    """Per-sample gradients of `LayerNorm`, for inputs `[N, ..., C]`."""


class TimmImageLayerNormSampler(TimmSampler, ImageLayerNormSampler):
    """Per-sample gradients of `LayerNorm2d`, for inputs `[N, C, H, W]`."""


class TimmGroupNormSampler(TimmSampler, GroupNormSampler):
    """Per-sample gradients of `GroupNorm` and `GroupNorm1`, for inputs `[N, C, ...]`."""

    def example(self, module: Any, random: Random) -> Tensor:
        """Return two images of 2 by 3 pixels."""
        return random(2, *module.weight.shape, 2, 3)


class LayerScaleSampler(TimmSampler, ScaleSampler):
    """Per-sample gradients of `LayerScale`, `x * gamma`, for inputs `[N, ..., C]`."""

    parameters = ("gamma",)

    def unfit(self, module: nn.Module) -> str | None:
        """Leave out what writes over its input, too."""
        return "it writes over its input" if module.inplace else super().unfit(module)

    def example(self, module: Any, random: Random) -> Tensor:
        """Return two samples of three tokens."""
        return random(*self.example_shape, *module.gamma.shape)

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input."""
        check_samples(call, rank=2)
        return {"gamma": self.normalized(call)}

    def normalized(self, call: Call) -> Normalized:
        """Keep the input, which is multiplied as it is."""
        return Normalized(only_input(call), _as_it_is)


class ImageLayerScaleSampler(LayerScaleSampler, ChannelScaleSampler):
    """Per-sample gradients of `LayerScale2d`, for inputs `[N, C, H, W]`."""

    def example(self, module: Any, random: Random) -> Tensor:
        """Return two images of 2 by 3 pixels."""
        return random(2, *module.gamma.shape, 2, 3)


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class WithShared(Record):
    """What a module got, with tensors of its own that all samples share.

    Attributes:
        x: The input, `[N, ...]`.
    """

    x: Tensor

    def expand(self, n: int) -> Self:
        """Return the record of a call that one row was computed for and n samples share."""
        return self.replace(x=self.x.expand(n, *self.x.shape[1:]))

    def narrow(self, samples: slice | Tensor) -> Self:
        """Return the record of some of the samples: a slice, or their positions."""
        return self.replace(x=self.x[samples])


@dataclass(frozen=True)
class Activated(WithShared):
    """The input of a batch norm that activates, and all that it computes with.

    Attributes:
        x: The input, `[N, C, ...]`.
        mean: Running mean, `[C]`.
        variance: Running variance, `[C]`.
        weight: The weight, `[C]`.
        bias: The bias, `[C]`.
        eps: What is added to the variance.
        activation: What the module does to the normalised input.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    activation: nn.Module

    def standardized(self) -> Standardized:
        """Return the input and the statistics, a row of them for each sample."""
        shape = self.x.shape[:2]
        return Standardized(self.x, self.mean.expand(shape), self.variance.expand(shape), self.eps)

    def before_activation(self, grad: Tensor, autocast: torch.dtype | None) -> Tensor:
        """Take the output gradient back through the activation.

        The norm is computed as it was: where an activation has a kink, one bit makes a difference.
        """
        kind = self.x.device.type
        with torch.enable_grad(), torch.autocast(kind, autocast, enabled=autocast is not None):
            statistics = self.mean, self.variance, self.weight, self.bias
            made = functional.batch_norm(self.x.detach(), *statistics, eps=self.eps).detach()
            if self._rectifies():
                # As autograd does, at a thirtieth of the time of `torch.where`.
                rectified: Tensor = torch.ops.aten.threshold_backward.default(grad, made, 0)
                return rectified
            activated = self.activation.forward(made.requires_grad_().clone())
            start = start_of_backward([activated], [grad])
        (found,) = torch.autograd.grad(start, [made])
        return found

    def _rectifies(self) -> bool:
        """Tell whether the activation is a plain ReLU, whose slopes nobody needs autograd for."""
        return type(self.activation) is nn.ReLU and "forward" not in vars(self.activation)


class BatchNormActivationSampler(TimmSampler, BatchNormSampler):
    """Per-sample gradients of `BatchNormAct2d` in evaluation, for inputs `[N, C, H, W]`."""

    def unfit(self, module: Any) -> str | None:
        """Leave out activations with parameters or random numbers, and other classes, too."""
        if type(module.drop) is not nn.Identity or type(module.act) not in _ACTIVATIONS:
            return f"its activation is {type(module.act).__name__}"
        if module.weight is None or module.running_mean is None:
            return "it has no parameters or no running statistics"
        return why_not_copied(module) or super().unfit(module)

    def shrink(self, module: Any) -> None:
        """Look at it in evaluation mode."""
        module.training = False

    def example(self, module: Any, random: Random) -> Tensor:
        """Return two images of 2 by 3 pixels."""
        return random(2, *module.weight.shape, 2, 3)

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input and what it is normalised with, or refuse statistics of the batch."""
        super().record(call)
        module: Any = call.module
        if reason := why_not_copied(module):
            raise WrongSplitError(
                f"gradients cannot be split by sample: {call.label} cannot be computed again",
                reason=reason,
            )
        kept = Activated(
            only_input(call),
            module.running_mean.clone(),
            module.running_var.clone(),
            module.weight.detach(),
            module.bias.detach(),
            module.eps,
            copy(module.act),
        )
        return {next(iter(call.shapes)): kept}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Take the output gradient back through the activation, then do as for a batch norm."""
        (grad,), (kept,) = grads, records.values()
        assert isinstance(kept, Activated)
        assert grad is not None
        before = kept.before_activation(grad, call.autocast)
        return super().gradients(call, {"weight": kept.standardized()}, [before])


@dataclass(frozen=True)
class StandardizedWeight(WithShared):
    """The input of a convolution, and the weight that is standardised for it.

    Attributes:
        x: The input as the kernel got it, `[N, G·c, *spatial]`.
        weight: The weight, `[p, c, *kernel]`.
        gain: What each output's standardised weight is multiplied by, `[p, 1]`.
        geometry: How the convolution moves over it.
        scale: What all outputs' are.
        eps: What is added to the variance.
    """

    weight: Tensor
    gain: Tensor
    geometry: Geometry
    scale: float
    eps: float

    def taken_back(self, gradients: Tensor, gain: bool) -> Tensor:
        """Take gradients of the standardised weight back, `[N, p, c, *kernel]`.

        Args:
            gradients: The gradients.
            gain: Whether to take them to the gain, `[N, p, 1, ...]`, or to the weight.
        """
        dtype = accumulation_dtype(gradients)
        rows, weight = gradients.flatten(2).to(dtype), self.weight.flatten(1).to(dtype)
        variance, mean = torch.var_mean(weight, 1, correction=0, keepdim=True)
        deviation = torch.rsqrt(variance + self.eps)
        unit = (weight - mean) * deviation
        along = (rows * unit).mean(2, keepdim=True)
        if gain:
            found = along * unit.shape[1] * self.scale
            return found.reshape(len(rows), len(weight), *[1] * (self.weight.dim() - 1))
        rows = rows - rows.mean(2, keepdim=True) - unit * along
        rows = rows * (self.gain.to(dtype) * self.scale * deviation)
        return rows.reshape(len(rows), *self.weight.shape)


class StandardizedConvolutionSampler(TimmSampler, ConvolutionSampler):
    """Per-sample gradients of `StdConv2d` and `ScaledStdConv2d`, for inputs `[N, C, H, W]`.

    The kernel is the weight of each output less its mean, by its deviation, times a gain. Its
    gradients are built, and taken back to weight and gain.
    """

    parameters = ("weight", "gain", "bias")

    def example(self, module: Any, random: Random) -> Tensor:
        """Return two images on which the kernel has three positions or more."""
        sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        image = [(size - 1) * dilation + 1 + 2 * stride for size, dilation, stride in sizes]
        return random(2, module.in_channels, *image)

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input and the weight."""
        module: Any = call.module
        asked = [name for name in ("weight", "gain") if name in call.shapes]
        if not asked:
            check_samples(call, rank=4)
            return {}
        weight, gain = module.weight.detach(), getattr(module, "gain", None)
        gain = weight.new_ones(()) if gain is None else gain.detach().flatten(1)
        (patches,) = super().record(replace(call, shapes={"weight": weight.shape})).values()
        assert isinstance(patches, Patches)
        scale = getattr(module, "scale", 1.0)
        kept = StandardizedWeight(patches.x, weight, gain, patches.geometry, scale, module.eps)
        return {asked[0]: kept}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Build the gradients of the kernel, and take them back."""
        (grad,) = grads
        assert grad is not None
        made: dict[str, PerSampleGradient] = {}
        if "bias" in call.shapes:
            made["bias"] = self.bias_gradient(grad, call.shapes["bias"])
        for kept in records.values():
            assert isinstance(kept, StandardizedWeight)
            patches = Patches(kept.x, kept.geometry)
            kernel = self.weight_gradient(patches, grad, kept.weight.shape).materialize()
            for name in call.shapes.keys() - {"bias"}:
                made[name] = Dense(kept.taken_back(kernel, name == "gain").unsqueeze(1))
        return made


TIMM: Mapping[str | type[nn.Module], type[GradientSampler]] = {
    "timm.layers.layer_scale.LayerScale": LayerScaleSampler,
    "timm.layers.layer_scale.LayerScale2d": ImageLayerScaleSampler,
    "timm.layers.linear.Linear": TimmLinearSampler,
    "timm.layers.norm.GroupNorm": TimmGroupNormSampler,
    "timm.layers.norm.GroupNorm1": TimmGroupNormSampler,
    "timm.layers.norm.LayerNorm": TimmLayerNormSampler,
    "timm.layers.norm.LayerNorm2d": TimmImageLayerNormSampler,
    "timm.layers.norm_act.BatchNormAct2d": BatchNormActivationSampler,
    "timm.layers.std_conv.ScaledStdConv2d": StandardizedConvolutionSampler,
    "timm.layers.std_conv.StdConv2d": StandardizedConvolutionSampler,
}
"""Samplers by dotted class name, for the classes whose code was compared, in timm 1.0."""
