"""Samplers for layers that look up rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import (
    Call,
    CaptureError,
    GradientSampler,
    InputFactor,
    Lookups,
    Outer,
    PastCall,
    PerSampleGradient,
    Record,
    as_tokens,
)
from ghost_core.algebra import accumulation_dtype
from ghost_layers.shapes import check_samples, only_input


class EmbeddingSampler(GradientSampler):
    """Per-sample gradients of `Embedding`, for indices `[N, ...]`.

    With `max_norm`, they are gradients of the table as renormalised, which autograd has too.
    """

    parameters = ("weight",)

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse gradients that depend on the other samples."""
        if getattr(module, "scale_grad_by_freq", False):
            return (
                "scale_grad_by_freq divides by how often a row occurs in the batch, so gradients "
                "of samples depend on each other; set scale_grad_by_freq=False"
            )
        return None

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the indices, and what their rows were multiplied by."""
        check_samples(call, rank=2)
        module: Any = call.module
        index: Tensor = only_input(call)
        index = index.reshape(len(index), index.shape[1:].numel()).long()  # [N, T]
        weight = self.token_weight(module, index, call.outputs[0])
        return {"weight": Lookups(index, call.shapes["weight"][0], weight)}

    def token_weight(self, module: Any, index: Tensor, output: Tensor) -> Tensor | None:
        """Return what rows are multiplied by before they are returned or summed.

        Args:
            module: The module.
            index: Indices `[N, T]`.
            output: The output.

        Returns:
            `[N, T]`, zero for padding; None stands for ones.
        """
        padding: int | None = module.padding_idx
        if padding is None:
            return None
        # One that was set later may be counted from the end, as torch takes it.
        kept: Tensor = index != padding % module.num_embeddings
        return kept

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Pair the rows with the output gradient."""
        (grad,) = grads
        factor = records["weight"]
        assert grad is not None
        assert isinstance(factor, InputFactor)
        return {"weight": Outer(factor, as_tokens(grad), call.shapes["weight"])}


class EmbeddingBagSampler(EmbeddingSampler):
    """Per-sample gradients of `EmbeddingBag`, for one bag per sample, `[N, T]`."""

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse `max`, whose choice of rows is not known afterwards."""
        if getattr(module, "mode", None) == "max":
            return "mode='max' is not supported; use mode='sum' or mode='mean'"
        return super().refuse(module)

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the indices, and what their rows were multiplied by."""
        module: Any = call.module
        index: Tensor = call.argument(0, "input")
        if index.dim() != 2:
            raise CaptureError(
                f"{call.label} was called with offsets, whose bags need not be the samples: give "
                f"it one bag per sample, [N, T]{call.or_exclude}"
            )
        given = dict(zip(("input", "offsets", "per_sample_weights"), call.args, strict=False))
        weight = (given | call.kwargs).get("per_sample_weights")
        kept = super().token_weight(module, index, call.outputs[0])
        if module.mode == "mean":
            ones = torch.ones_like(index, dtype=accumulation_dtype(call.outputs[0]))
            ones = ones if kept is None else ones * kept
            weight = ones / ones.sum(1, keepdim=True).clamp(min=1)
        elif weight is None:
            weight = kept
        elif kept is not None:
            weight = weight * kept
        call.static = index.shape[1]
        return {"weight": Lookups(index.long(), call.shapes["weight"][0], weight)}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Pair every row of a bag with the bag's output gradient."""
        (grad,) = grads
        assert grad is not None
        return super().gradients(call, records, [grad.unsqueeze(1).expand(-1, call.static, -1)])
