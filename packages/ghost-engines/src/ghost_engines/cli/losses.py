"""The loss that language models are verified with, unless another one is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function, reporting
from ghost_engines.dataset import IGNORED

_INTEGERS = (
    torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64,
)  # fmt: skip


DEFAULT_LOSS = "mean cross-entropy of each sample's next tokens"

_LOSSES = {
    "mean": (DEFAULT_LOSS, "mean"),
    "sum": ("summed cross-entropy of each sample's next tokens", "sum"),
}


def load_loss(text: str | None) -> tuple[Callable[[Any, Any], Any], str]:
    """Return the function of model and batch that an option names, and what it is.

    Args:
        text: `module:function`; None for the loss of language models, which "mean" or "sum" over
            the tokens of a sample.

    Raises:
        CommandError: If there is no such function.
    """
    if text is None or text in _LOSSES:
        name, reduction = _LOSSES[text or "mean"]
        return reporting(partial(next_token_losses, reduction=reduction), "the model"), name
    if ":" not in text:
        close = get_close_matches(text, _LOSSES, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise CommandError(
            f"--loss: {text!r} is not {' or '.join(map(repr, _LOSSES))}, and not of the form "
            f"module:function{meant}"
        )
    return find_function(text, "--loss"), text


def next_token_losses(model: nn.Module, batch: Any, *, reduction: str = "mean") -> Tensor:
    """Return the mean cross-entropy of each sample's next tokens, `[N]`, without padding.

    Logits are widened to float32, or float64 if they are. A sample without a token to predict has
    a loss of zero. Encoder-decoder models read the same tokens on both sides. Where there are
    `labels`, tokens whose label is -100 are not predicted.

    Args:
        model: Maps token ids `[N, T]` to logits `[N, T, vocabulary]`, or to an object or tuple
            that holds them.
        batch: Token ids, or a mapping with `input_ids` and perhaps `attention_mask` and `labels`.
        reduction: "mean" or "sum" over the tokens that are predicted.

    Raises:
        CommandError: If batch or output are of another kind.
    """
    ids, mask = _tokens(batch)
    logits = _logits(model, ids, mask)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    each = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    predicted = (mask[:, 1:] * mask[:, :-1] != 0) & _learnt(batch, ids)[:, 1:]
    # A padded position may hold anything, also NaN.
    total = torch.where(predicted, each, 0.0).sum(1)
    return total if reduction == "sum" else total / predicted.sum(1).clamp(min=1)


def _learnt(batch: Any, ids: Tensor) -> Tensor:
    """Return which tokens are part of the loss, `[N, T]`."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        raise CommandError("the batch's labels are not one for each token id")
    return labels != IGNORED


def _tokens(batch: Any) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, `[N, T]` each."""
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in _INTEGERS:
        raise CommandError(
            "the batch has no token ids [N, T]: give a loss for it, --loss module:function"
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or not mask.isfinite().all():
        raise CommandError("the batch's attention_mask is not one finite number for each token id")
    return ids.long(), mask.long()


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Call a model with the inputs that it takes."""
    offered = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    taken = inspect.signature(model.forward).parameters
    if "input_ids" in taken:
        output = model(**{name: value for name, value in offered.items() if name in taken})
    else:
        output = model(ids)
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) and logits else logits
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise CommandError(
            f"the model returned no logits {(*ids.shape, 'vocabulary')}, but {found}: give a loss "
            "for it, --loss module:function"
        )
    return logits
