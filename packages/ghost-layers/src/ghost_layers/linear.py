"""Samplers for layers that multiply their input by a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ghost_core import (
    Call,
    Dense,
    GradientSampler,
    InputFactor,
    Outer,
    PerSampleGradient,
    Record,
    Tokens,
    as_tokens,
)
from ghost_layers.layout import check_samples, only_input


class LinearSampler(GradientSampler):
    """Per-sample gradients of `y = x Wᵀ + b`, for inputs `[N, ..., d]`."""

    parameters = ("weight", "bias")
    transposed: ClassVar[bool] = False
    """Whether the weight is laid out `[d, p]`."""

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input in the dtype that the product ran in."""
        check_samples(call, rank=2)
        if "weight" not in call.shapes:
            return {}
        inputs = as_tokens(only_input(call).to(call.outputs[0].dtype))
        return {"weight": Tokens(inputs, self.transposed)}

    def gradients(
        self, call: Call, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Pair the input with the output gradient."""
        (output_grad,) = grads
        assert output_grad is not None
        grad = as_tokens(output_grad)
        gradients: dict[str, PerSampleGradient] = {}
        for name, shape in call.shapes.items():
            if name == "bias":
                gradients[name] = Dense(grad.squeeze(2))
            else:
                factor = records[name]
                assert isinstance(factor, InputFactor)
                gradients[name] = Outer(factor, grad, shape)
        return gradients


class Conv1DSampler(LinearSampler):
    """Per-sample gradients of transformers' `Conv1D`, `y = x W + b`."""

    transposed = True
