"""In-run values inside Hugging Face's Trainer: what four kinds of text did for two of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, default_data_collator

from ghost_engines import GroupValues, IdCollator, RunConfig, with_ids
from ghost_engines.frameworks import GhostCallback, GhostTrainer
from ghost_examples.command_line import read_options, refusals
from ghost_examples.texts import Passage, build_vocabulary, passages

TARGETS = ("scripture", "python")
"""The kinds of text whose validation losses are the directions."""

HELD = 8
"""Passages of each kind that are held out."""


@dataclass(frozen=True)
class Options:
    """How much to train.

    Attributes:
        folder: Where checkpoints and the run go to. A run that is there already is resumed.
        per_domain: Passages of each kind of text.
        length: Tokens of a passage.
        width: Width of the model.
        epochs: How often each passage is seen.
        batch: Passages of a batch.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    per_domain: int = 64
    length: int = 64
    width: int = 64
    epochs: int = 3
    batch: int = 8


def run(options: Options) -> GroupValues:
    """Train, and return the values by domain."""
    torch.manual_seed(0)
    cut = passages(options.length, per_domain=options.per_domain + HELD)
    kept = [each for at, each in enumerate(cut) if at % (options.per_domain + HELD) >= HELD]
    held = {name: [each for each in cut if each.domain == name][:HELD] for name in TARGETS}
    losses = {name: [as_row(each) for each in texts] for name, texts in held.items()}
    ghost = GhostCallback(RunConfig(folder=options.folder / "ghost"), directions=losses)
    size, length, width = build_vocabulary().size, options.length, options.width
    config = GPT2Config(vocab_size=size, n_positions=length, n_embd=width, n_layer=2, n_head=2)
    trainer = GhostTrainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=str(options.folder),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-3,
            remove_unused_columns=False,  # or the ids are taken away
            report_to="none",
        ),
        train_dataset=with_ids([as_row(each) for each in kept]),
        data_collator=IdCollator(default_data_collator),
        callbacks=[ghost],
    )
    trainer.train(resume_from_checkpoint=bool(list(options.folder.glob("checkpoint-*"))))
    return ghost.values.by_group({at: each.domain for at, each in enumerate(kept)})


def as_row(passage: Passage) -> dict[str, list[int]]:
    """Return what a language model of transformers is trained on."""
    return {"input_ids": list(passage.tokens), "labels": list(passage.tokens)}


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    options = read_options(Options, arguments, name="trainer_values", description=__doc__)
    with refusals():
        print(run(options).to_pandas().to_string(index=False))


if __name__ == "__main__":
    main()
