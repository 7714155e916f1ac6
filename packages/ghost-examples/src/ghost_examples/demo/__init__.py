"""The demo: find wrong labels, look up passages, check the numbers, write a report."""

from ghost_examples.demo.once_more import LR, choose, step_on_each
from ghost_examples.demo.passages import (
    LAYERS,
    Plan,
    as_tokens,
    new_model,
    per_sample_loss,
    split,
    train,
)

__all__ = [
    "LAYERS",
    "LR",
    "Plan",
    "as_tokens",
    "choose",
    "new_model",
    "per_sample_loss",
    "split",
    "step_on_each",
    "train",
]
