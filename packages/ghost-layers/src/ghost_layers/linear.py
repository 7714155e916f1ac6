"""Samplers for layers that multiply their input by a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Size, Tensor

from ghost_core import (
    Call,
    Dense,
    Outer,
    PerSampleGradient,
    Record,
    Tokens,
    as_tokens,
)
from ghost_layers.affine import AffineSampler
from ghost_layers.shapes import check_samples, only_input
from ghost_layers.transformers import FormulaChecked, Random


class LinearSampler(AffineSampler):
    """Per-sample gradients of `y = x Wᵀ + b`, for inputs `[N, ..., d]`."""

    transposed: ClassVar[bool] = False
    """Whether the weight is laid out `[d, p]`."""

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input in the dtype that the product ran in."""
        check_samples(call, rank=2)
        if "weight" not in call.shapes:
            return {}
        inputs = as_tokens(only_input(call).to(call.outputs[0].dtype))
        return {"weight": Tokens(inputs, self.transposed)}

    def weight_gradient(self, record: Any, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Pair the input, an `InputFactor`, with the output gradient."""
        return Outer(record, as_tokens(grad), shape)

    def bias_gradient(self, grad: Tensor, shape: Size) -> PerSampleGradient:
        """Take the output gradient as it is."""
        return Dense(grad if grad.dim() == 3 else as_tokens(grad).squeeze(2))


class FalconLinearSampler(FormulaChecked, LinearSampler):
    """Per-sample gradients of transformers' `FalconLinear`, `y = x Wᵀ + b` again."""

    def shrink(self, module: Any) -> None:
        """Leave the copy 4 inputs and 5 outputs, or fewer."""
        inputs_by_outputs = (slice(4), slice(5))
        sides = inputs_by_outputs if self.transposed else inputs_by_outputs[::-1]
        module._parameters["weight"] = module.weight[sides]
        if module.bias is not None:
            module._parameters["bias"] = module.bias[:5]

    def example(self, module: Any, random: Random) -> Tensor:
        """Return inputs `[2, 3, d]`."""
        return random(*self.example_shape, module.weight.shape[0 if self.transposed else 1])


class Conv1DSampler(FalconLinearSampler):
    """Per-sample gradients of transformers' `Conv1D`, `y = x W + b`."""

    transposed = True

    def shrink(self, module: Any) -> None:
        """Make the copy smaller, and tell it its number of outputs."""
        super().shrink(module)
        module.nf = module.weight.shape[1]
