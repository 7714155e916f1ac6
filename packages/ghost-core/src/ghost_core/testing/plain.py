"""Samplers for three common layers, as plain as can be: to test engines with nothing installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ghost_core import (
    Call,
    Dense,
    GradientSampler,
    Lookups,
    Outer,
    PastCall,
    PerSampleGradient,
    Record,
    SamplerRegistry,
    Tokens,
    as_tokens,
)
from ghost_core.algebra import accumulation_dtype
from ghost_core.tracking import Claim, dotted_name


class PlainLinear(GradientSampler):
    """Handles `nn.Linear`."""

    parameters = ("weight", "bias")

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input."""
        if "weight" not in call.shapes:
            return {}
        return {"weight": Tokens(as_tokens(call.argument(0, "input").to(call.outputs[0].dtype)))}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Pair the input with the output gradient."""
        grad = as_tokens(_only(grads))
        made: dict[str, PerSampleGradient] = {}
        if "weight" in call.shapes:
            factor = records["weight"]
            assert isinstance(factor, Tokens)
            made["weight"] = Outer(factor, grad, call.shapes["weight"])
        if "bias" in call.shapes:
            made["bias"] = Dense(grad.squeeze(2))
        return made


class PlainEmbedding(GradientSampler):
    """Handles `nn.Embedding`, also with a padding index."""

    parameters = ("weight",)

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse what makes the gradient more than a sum over tokens."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "max_norm, scale_grad_by_freq and sparse are not handled"
        return None

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the indices."""
        module, index = call.module, call.argument(0, "input")
        assert isinstance(module, nn.Embedding)
        index = index.reshape(index.shape[0], index.shape[1:].numel())
        padding = module.padding_idx
        weight = None if padding is None else (index != padding).to(call.outputs[0].dtype)
        return {"weight": Lookups(index, module.num_embeddings, weight)}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Pair the rows with the output gradient."""
        factor, grad = records["weight"], _only(grads)
        assert isinstance(factor, Lookups | Tokens)
        return {"weight": Outer(factor, as_tokens(grad), call.shapes["weight"])}


class PlainLayerNorm(GradientSampler):
    """Handles `nn.LayerNorm` over the last axis."""

    parameters = ("weight", "bias")

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse several normalised axes."""
        assert isinstance(module, nn.LayerNorm)
        return None if len(module.normalized_shape) == 1 else "only the last axis can be normalised"

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input; the normalised one is computed again from it."""
        assert isinstance(call.module, nn.LayerNorm)
        if "weight" not in call.shapes:
            return {}
        call.static = call.module.eps
        # Not an input factor: there is no outer product that could be compressed.
        return {"weight": Normalised(call.argument(0, "input"))}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Multiply the output gradient with the normalised input."""
        grad = as_tokens(_only(grads)).squeeze(2)  # [N, T, d]
        made: dict[str, PerSampleGradient] = {}
        if "weight" in call.shapes:
            record = records["weight"]
            assert isinstance(record, Normalised)
            grad = grad.to(accumulation_dtype(grad))
            x = as_tokens(record.x).squeeze(2).to(grad.dtype)
            made["weight"] = Dense(
                grad * nn.functional.layer_norm(x, x.shape[-1:], eps=call.static)
            )
        if "bias" in call.shapes:
            made["bias"] = Dense(grad)
        return made


@dataclass(frozen=True)
class Normalised(Record):
    """The input of a normalisation, `[N, ..., d]`."""

    x: Tensor


def plain_registry() -> SamplerRegistry:
    """Return a registry of these samplers, to give to engines as `registry=...`."""
    layers: dict[type[nn.Module], type[GradientSampler]] = {
        nn.Linear: PlainLinear,
        nn.Embedding: PlainEmbedding,
        nn.LayerNorm: PlainLayerNorm,
    }
    return SamplerRegistry(
        Claim(dotted_name(layer), sampler, "ghost_core.testing")
        for layer, sampler in layers.items()
    )


def _only(grads: Sequence[Tensor | None]) -> Tensor:
    (grad,) = grads
    assert grad is not None
    return grad
