"""`MultiheadAttention` written out, down to the linear maps that it consists of.

With one input x for queries, keys and values, `[q k v] = W x` and `y = V a(q, k, v)`: one backward
pass for all samples gives the gradients b of `[q k v]`, and c of y is given, so that

    g_n = Σ_t b[n, t] ⊗ x[n, t]  for W
    g_n = Σ_t c[n, t] ⊗ a[n, t]  for V
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Size, Tensor, nn
from torch.nn import functional

from ghost_core import Dense, Outer, PerSampleGradient, Tokens
from ghost_core._torch import start_of_backward


@dataclass(frozen=True)
class Projection:
    """One linear map of a call, or as much of a map as one input goes through.

    Attributes:
        weight: Name of its weight.
        bias: Name of its bias.
        rows: Which rows of the weight make the results.
        entries: Which entries of the bias are added to them.
        inputs: `[N, T, d]`.
        results: `[N, T, p]`.
    """

    weight: str
    bias: str
    rows: slice
    entries: slice
    inputs: Tensor
    results: Tensor

    @classmethod
    def of(
        cls, module: nn.Module, weight: str, bias: str, inputs: Tensor, rows: slice, entries: slice
    ) -> Projection:
        """Map inputs by some rows of a module's weight, and some entries of its bias, if any."""
        matrix, values = attrgetter(weight)(module), attrgetter(bias)(module)
        added = None if values is None else values[entries]
        results: Tensor = functional.linear(inputs, matrix[rows], added)
        # Gradients are taken to here: those of the weight have a closed form.
        results = results if results.requires_grad else results.requires_grad_()
        return cls(weight, bias, rows, entries, inputs.detach(), results)


@dataclass(frozen=True)
class Attended:
    """A call of an attention.

    Attributes:
        outputs: What it returns, as the module lays it out.
        projections: The linear maps in it.
    """

    outputs: list[Tensor]
    projections: list[Projection]


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # a hint: the mask says the same
) -> Attended:
    """Do what `MultiheadAttention` does, without dropout; the inputs are its own.

    Args:
        module: The attention.
        query: `[N, T, d]`, or `[T, N, d]` without `batch_first`; the others likewise.
        key: `[N, S, d]`.
        value: `[N, S, d]`.
        key_padding_mask: `[N, S]`.
        need_weights: Whether the weights are returned.
        attn_mask: `[T, S]` or `[N·heads, T, S]`.
        average_attn_weights: Whether those returned are averaged over heads.
        is_causal: Whether the mask is causal.
    """
    made = list(_projections(module, query, key, value))
    parts = [part for each in made for part in each.results.split(module.embed_dim, -1)]
    q, k, v = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in parts)
    mask = _mask(q, k, key_padding_mask, attn_mask)
    weights = None
    if need_weights:
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        mixed = weights @ v
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask)
    mixed = mixed.transpose(1, 2).flatten(2)
    whole = slice(None)
    out = Projection.of(module, "out_proj.weight", "out_proj.bias", mixed, whole, whole)
    outputs = [out.results if module.batch_first else out.results.transpose(0, 1)]
    if weights is not None:
        outputs.append(weights.mean(1) if average_attn_weights else weights)
    return Attended(outputs, [*made, out])


def _projections(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[Projection]:
    """Yield the maps to queries, keys and values: one, if all have the same input."""
    same = query is key and key is value
    given = [each if module.batch_first else each.transpose(0, 1) for each in (query, key, value)]
    width, bias = module.embed_dim, "in_proj_bias"
    if module.in_proj_weight is not None and same:
        whole = slice(None)
        yield Projection.of(module, "in_proj_weight", bias, given[0], whole, whole)
        return
    for at, (name, inputs) in enumerate(zip("qkv", given, strict=True)):
        part = slice(at * width, (at + 1) * width)
        packed = module.in_proj_weight is not None
        weight = "in_proj_weight" if packed else f"{name}_proj_weight"
        yield Projection.of(module, weight, bias, inputs, part if packed else slice(None), part)


def _mask(q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return what is added to the scores, `[N, heads, T, S]` or less; None for nothing."""
    added = None
    if mask is not None:
        shape = (1, 1) if mask.dim() == 2 else q.shape[:2]
        added = _as_numbers(mask, q).view(*shape, *mask.shape[-2:])
    if padding is not None:
        per_sample = _as_numbers(padding, q).view(len(k), 1, 1, k.shape[2])
        added = per_sample if added is None else added + per_sample
    return added


def _as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    """Return what a mask adds: where it is true, nothing is attended to."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def differentiate(
    outputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    projections: Sequence[Projection],
    shapes: Mapping[str, Size],
) -> dict[str, PerSampleGradient]:
    """Return the per-sample gradients from one backward pass for all samples.

    Args:
        outputs: What the loss depends on.
        slopes: Gradients of the loss, laid out as the outputs.
        projections: The linear maps of the call.
        shapes: Shapes of the parameters asked for.
    """
    start = start_of_backward(outputs, slopes)
    results = [each.results for each in projections]
    found = torch.autograd.grad(start, results, allow_unused=True)
    grads = [
        torch.zeros_like(result) if grad is None else grad
        for result, grad in zip(results, found, strict=True)
    ]
    made: dict[str, PerSampleGradient] = {}
    for name, shape in shapes.items():
        pairs = list(zip(projections, grads, strict=True))
        weighed = [(each, grad) for each, grad in pairs if each.weight == name]
        added = [(each, grad) for each, grad in pairs if each.bias == name]
        if weighed:
            inputs = _joined([each.inputs.to(grad.dtype) for each, grad in weighed])
            rows = _joined([_placed(grad, each.rows, shape[0]) for each, grad in weighed])
            made[name] = Outer(Tokens(inputs.unsqueeze(2)), rows.unsqueeze(2), shape)
        elif added:
            terms = [_placed(grad, each.entries, shape[0]) for each, grad in added]
            made[name] = Dense(_joined(terms))
    return made


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put tokens behind each other, `[N, T, ...]` each."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _placed(grad: Tensor, rows: slice, size: int) -> Tensor:
    """Give the gradient of some results, `[N, T, p]`, zeros for all others."""
    if rows == slice(None):
        return grad
    whole = grad.new_zeros(*grad.shape[:2], size)
    whole[..., rows] = grad
    return whole
