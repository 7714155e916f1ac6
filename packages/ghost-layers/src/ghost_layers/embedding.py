"""Samplers for layers that look up rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        if index.dim() != 2:
            index = index.reshape(index.shape[0], index.shape[1:].numel())
        index = index.long()  # [N, T]
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
    """Per-sample gradients of `EmbeddingBag`, for bags `[N, T]`, or joined ones with offsets.

    The largest entries, with `mode="max"`, may come from another row of the table for each feature:
    a bag is one lookup for each feature then.
    """

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the indices, and what their rows were multiplied by."""
        module: Any = call.module
        given = dict(zip(("input", "offsets", "per_sample_weights"), call.args, strict=False))
        index: Tensor = call.argument(0, "input")
        offsets, weight = (
            (given | call.kwargs).get(name) for name in ("offsets", "per_sample_weights")
        )
        there: Tensor | None = None
        if index.dim() != 2:
            if offsets is None:
                raise CaptureError(f"{call.label} was called without bags{call.or_exclude}")
            bags = _Bags.of(offsets, len(index), last=module.include_last_offset)
            index, there = bags.padded(index), bags.there
            weight = None if weight is None else bags.padded(weight)
        kept = super().token_weight(module, index, call.outputs[0])
        kept = kept if there is None else there if kept is None else kept & there
        call.static = module.mode == "max", index.shape[1]
        size = call.shapes["weight"][0]
        if module.mode == "max":
            return {"weight": _chosen(module.weight.detach(), index.long(), kept, size)}
        if module.mode == "mean":
            ones = torch.ones_like(index, dtype=accumulation_dtype(call.outputs[0]))
            ones = ones if kept is None else ones * kept
            weight = ones / ones.sum(1, keepdim=True).clamp(min=1)
        elif weight is None:
            weight = kept
        elif kept is not None:
            weight = weight * kept
        return {"weight": Lookups(index.long(), size, weight)}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Pair every row of a bag with the bag's output gradient, or with a part of it."""
        (grad,) = grads
        assert grad is not None
        largest, length = call.static
        if not largest:
            return super().gradients(call, records, [grad.unsqueeze(1).expand(-1, length, -1)])
        factor, by_feature = records["weight"], as_tokens(torch.diag_embed(grad))
        assert isinstance(factor, InputFactor)
        return {"weight": _Whole(factor, by_feature, call.shapes["weight"])}


class _Whole(Outer):
    """A sum over features, none of which is a token of the sample."""

    def token_dot(self, directions: Tensor) -> Tensor:
        """Return the dots of whole samples, `[N, 1, K]`."""
        return self.dot(directions).unsqueeze(1)


@dataclass(frozen=True)
class _Bags:
    """Bags that are joined in one tensor.

    Attributes:
        at: Position of each entry, `[N, T]`; zero where a bag has none.
        there: Whether there is an entry, `[N, T]`.
    """

    at: Tensor
    there: Tensor

    @classmethod
    def of(cls, offsets: Tensor, total: int, *, last: bool) -> _Bags:
        """Find the bags from where they begin, and where the last one ends if that is among it."""
        starts = offsets[:-1] if last else offsets
        ends = offsets[1:] if last else torch.cat((offsets[1:], offsets.new_tensor([total])))
        lengths = (ends - starts).long()
        steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=offsets.device)
        there = steps < lengths[:, None]
        return cls((starts.long()[:, None] + steps) * there, there)

    def padded(self, values: Tensor) -> Tensor:
        """Lay out joined values in bags, `[N, T]`; what they hold where nothing is says nothing."""
        return values[self.at] if len(values) else values.new_zeros(self.at.shape)


def _chosen(table: Tensor, index: Tensor, kept: Tensor | None, size: int) -> Lookups:
    """Return the row that each feature of a bag comes from, `[N, d]`: the first of the largest."""
    if not index.shape[1]:
        nothing = index.new_zeros(len(index), table.shape[1])
        return Lookups(nothing, size, torch.zeros_like(nothing, dtype=torch.bool))
    values = table[index]  # [N, T, d]
    if kept is not None:
        values = values.masked_fill(~kept.unsqueeze(2), -torch.inf)
    rows = index.gather(1, values.max(1).indices)
    some = None if kept is None else kept.any(1, keepdim=True).expand_as(rows)
    return Lookups(rows, size, some)
