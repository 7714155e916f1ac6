"""What a training run of a language model does, as fields of a command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ghost_core import CaptureError, UnknownNameError
from ghost_examples.language_models.models import PRESETS
from ghost_examples.language_models.tokenizers import EMBEDDED

METHODS = ("none", "exact", "concatenated", "fused")
"""How values come about: the modes of dot products, or not at all."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Attributes:
        results_dir: Where results and checkpoints go. A run that is there is gone on with.
        corpus: "embedded" for the texts of this package, or a folder that
            `python -m ghost_examples.tokenize` has written.
        domains: Names of domains, separated by commas; all by default.
        preset: Size of a new GPT-2: tiny, small, medium, large.
        model: Folder of a causal language model to train on, in place of a new one.
        method: How values come about: exact, fused, concatenated, or none.
        length: Tokens of a block, for the embedded corpus; others have their own.
        steps: Training steps.
        batch: Blocks in each step, on each process.
        validation: Blocks of each validation domain that a step's values are for; each step takes
            the next ones.
        lr: Learning rate of AdamW; it rises over the first tenth of the steps, then falls to a
            tenth of itself.
        weight_decay: Pulls the parameters towards zero.
        clip: The norm that gradients are clipped by.
        dropout: Of a new GPT-2.
        dtype: What the forward pass computes in: float32, or bfloat16 by autocast.
        device: cpu, cuda, ...; by default cuda where there is one.
        seed: Of parameters and of the order of samples.
        workers: Processes that read blocks.
        eval_every: Steps between evaluations of the validation loss.
        eval_blocks: Blocks of each validation domain that it is measured on, at most.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of progress.
        shown: How many passages to show, most and least valuable.
        check_domains: Train again without each domain, and compare what that did to the validation
            losses with what values say.
    """

    results_dir: Path = Path("lm-results")
    corpus: str = EMBEDDED
    domains: str = ""
    preset: str = "tiny"
    model: Path | None = None
    method: str = "exact"
    length: int = 128
    steps: int = 200
    batch: int = 8
    validation: int = 2
    lr: float = 3e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    dropout: float = 0.0
    dtype: str = "float32"
    device: str = ""
    seed: int = 0
    workers: int = 0
    eval_every: int = 50
    eval_blocks: int = 16
    save_every: int = 100
    log_every: int = 10
    shown: int = 3
    check_domains: bool = False

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("preset", PRESETS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)
        counts = ("steps", "batch", "validation", "eval_every", "eval_blocks", "save_every")
        for name in (*counts, "log_every", "shown"):
            if getattr(self, name) < 1:
                raise CaptureError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (self.lr > 0 and self.clip > 0 and 0 <= self.dropout < 1):
            raise CaptureError(
                f"lr and clip must be above 0, and dropout from 0 to below 1, not {self.lr}, "
                f"{self.clip} and {self.dropout}"
            )
        if self.check_domains and self.method in ("none", "concatenated"):
            raise CaptureError(
                f"check_domains needs values by validation domain, and method={self.method!r} has "
                "none",
                remedy="take method exact or fused",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains; none stands for all."""
        return tuple(name.strip() for name in self.domains.split(",") if name.strip())
