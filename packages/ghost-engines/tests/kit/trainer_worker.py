"""One of two processes of Hugging Face's Trainer: python trainer_worker.py RANK FOLDER."""

import json
import os
import sys
from pathlib import Path

import torch
from process_kit import take_part
from trainer_kit import RATE, rows, tiny

from ghost_engines import IdCollator, RunConfig, with_ids
from ghost_engines.frameworks import GhostCallback, GhostTrainer


def train(folder, batch, resumes=False):
    """Train on sixteen samples; return values, parameters and whose they are."""
    from transformers import TrainingArguments, default_data_collator

    callback = GhostCallback(RunConfig(folder=folder / "run"), {"val": rows(3, seed=2)})
    trainer = GhostTrainer(
        model=tiny(),
        args=TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=2,
            num_train_epochs=2, learning_rate=RATE, optim="sgd", lr_scheduler_type="constant",
            report_to="none", remove_unused_columns=False, use_cpu=True, save_steps=1,
            disable_tqdm=True, max_grad_norm=0.5,
        ),
        train_dataset=with_ids(rows(16, seed=1)),
        data_collator=IdCollator(default_data_collator),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(str(folder / "checkpoint-2") if resumes else None)
    return {
        "values": callback.values.to_dict(),
        "parameters": {name: each.tolist() for name, each in trainer.model.named_parameters()},
        "files": sorted(each.name for each in (folder / "checkpoint-2").glob("ghost*")),
    }


def main(rank, folder):
    """Join the other process, train, and write what was found."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", # the group is there already
    }  # fmt: skip

    def work():
        found = [train(folder / "two", 2), train(folder / "two", 2, resumes=True)]
        (folder / f"{rank}.json").write_text(json.dumps(found))

    take_part(rank, folder, work)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
