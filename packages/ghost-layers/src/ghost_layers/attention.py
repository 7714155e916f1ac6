"""The sampler for `torch.nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ghost_core import Call, WrongSplitError
from ghost_layers.attended import attend
from ghost_layers.replay import Formula, InputRows, ReplaySampler


class MultiheadAttentionSampler(ReplaySampler):
    """Per-sample gradients of `MultiheadAttention`, its output projection included.

    Queries, keys and values are `[N, T, d]`, or `[T, N, d]` without `batch_first`. A padding mask
    `[N, S]` and an attention mask `[N·heads, T, S]` belong to samples; samples share an attention
    mask `[T, S]`, also where it has as many rows as there are samples.
    """

    parameters = (
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "bias_k",
        "bias_v",
        "out_proj.weight",
        "out_proj.bias",
    )

    def batch_dims(self, module: nn.Module, outputs: int) -> tuple[int, ...]:
        """Attention weights are `[N, T, S]` or `[N, heads, T, S]` in any case."""
        attention: Any = module
        return (0 if attention.batch_first else 1, 0)[:outputs]

    def rewritten(self, module: nn.Module) -> Formula | None:
        """Run it by its formula, where nothing is drawn, added to keys or behind its weights."""
        attention: Any = module
        draws = module.training and attention.dropout > 0
        extended = attention.bias_k is not None or attention.add_zero_attn
        formula = type(attention).forward is nn.MultiheadAttention.forward
        named = all("parametrizations" not in name for name, _ in module.named_parameters())
        return attend if formula and named and not (draws or extended) else None

    def draws(self, module: nn.Module) -> bool:
        """Only dropout draws, and what may stand behind a weight: its formula has neither."""
        return self.rewritten(module) is None

    def sides(self, call: Call) -> Mapping[int, InputRows]:
        """Find the samples of the inputs and masks.

        Raises:
            WrongSplitError: If there is no axis for samples.
        """
        module: Any = call.module
        sides: dict[int, InputRows] = {}
        for at, name in enumerate(("query", "key", "value")):
            value: Tensor = call.argument(at, name)
            if value.dim() != 3:
                raise WrongSplitError(
                    reason=f"its {name} has the shape {tuple(value.shape)}, without an "
                    "axis for samples",
                    remedy="give it inputs with three axes",
                )
            sides[id(value)] = InputRows(own=True, axis=0 if module.batch_first else 1)
        padding, mask = _given(call, 3, "key_padding_mask"), _given(call, 5, "attn_mask")
        if padding is not None:
            sides[id(padding)] = InputRows(own=True)
        if mask is not None:
            sides[id(mask)] = InputRows(own=mask.dim() == 3, fold=mask.dim() == 3)
        return sides


def _given(call: Call, position: int, name: str) -> Tensor | None:
    value: Tensor | None = call.kwargs.get(name)
    return call.args[position] if position < len(call.args) else value
