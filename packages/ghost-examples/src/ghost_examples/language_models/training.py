"""Trains a language model, with values of its samples, so that it can be killed and go on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ghost_engines import DotProductEngine, Run, RunConfig, ValueTable, adam_aware, take_ids
from ghost_engines.processes import process_count, process_rank
from ghost_examples.language_models.data import Batches, Corpora, blocks, loader
from ghost_examples.language_models.models import load_causal, new_gpt2, per_sample_loss
from ghost_examples.language_models.options import DTYPES, Options
from ghost_examples.language_models.pace import Pace, Say

VALIDATION = "val_"
"""What the names of validation losses begin with, among the metrics."""


@dataclass(frozen=True)
class Plan:
    """What a run trains, and what on.

    Attributes:
        options: How to train.
        corpora: What on.
        folder: Where the run writes to.
        method: How values come about: see `Options`.
        without: Name of a domain that is left out of the loss of every step.
    """

    options: Options
    corpora: Corpora
    folder: Path
    method: str
    without: str | None = None

    @property
    def joins(self) -> bool:
        """Whether validation samples go through the model with those of training."""
        return self.method == "concatenated"


class Trainer:
    """Trains a model, or goes on with a run that was stopped.

    Args:
        plan: What is trained, and how.
        device: Where.

    Attributes:
        step: Number of steps so far.
        folder: Where this process writes to.

    Raises:
        CorpusError: If the model does not suffice for the data.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        asked, train = plan.options, plan.corpora.train
        self.model = _model(asked, train.vocabulary, train.length).to(device).train()
        # What a process calls: DDP averages the gradients of all of them.
        self.called = DistributedDataParallel(self.model) if process_count() > 1 else self.model
        # A shorter memory of squares than AdamW's own: rare tokens come as large steps otherwise.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), asked.lr, (0.9, 0.95), weight_decay=asked.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda at: rate(at, asked.steps)
        )
        self.step = 0
        self.folder = plan.folder
        # Each process has its own dropout masks.
        torch.manual_seed(asked.seed + process_rank())

    def train(self, say: Say) -> ValueTable | None:
        """Train to the last step; return the values of all processes, if there are any.

        Args:
            say: Is told of the progress.

        Raises:
            CaptureError: If the folder has another run.
        """
        asked = self.plan.options
        state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }
        with self._run() as run:
            self.step, self.folder = run.resume(**state), run.folder
            if self.step == 0:
                self._evaluate(run)
            tokens = self.plan.corpora.train.length * asked.batch * process_count()
            pace = Pace(self.step, asked.steps, tokens, asked.log_every, say)
            for batch in self._batches():
                loss = self._make_step(run, take_ids(batch), batch["input_ids"].to(self.device))
                self.step += 1
                run.record(loss=loss)
                pace.stepped(self.step, loss)
                done = self.step == asked.steps
                if done or self.step % asked.eval_every == 0:
                    self._evaluate(run)
                if done or self.step % asked.save_every == 0:
                    run.save(**state)
            return None if self.plan.method == "none" else run.values.gathered()

    def losses(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Return the loss of each sample, `[N]`."""
        with self._autocast():
            return per_sample_loss(model, tokens)

    def _run(self) -> Run:
        plan = self.plan
        separate = plan.method in ("exact", "fused")
        config = RunConfig(
            folder=plan.folder,
            method="none" if plan.method == "none" else "dot_product",
            mode=plan.method if plan.method != "none" else "exact",
        )
        targets = {name: self._loss_of(name) for name in plan.corpora.val.domains}
        run = Run(self.called, self.optimizer, config, directions=targets if separate else {})
        aware = adam_aware(self.optimizer)
        for engine in run.engines.values():
            if separate and isinstance(engine, DotProductEngine):
                for name, target in targets.items():  # in the unit of what a step of Adam does
                    engine.add_direction(name, target, transform=aware)
        return run

    def _make_step(self, run: Run, ids: Tensor, tokens: Tensor) -> Tensor:
        """Make a step; return the loss of its batch."""
        weights = self.weights(ids)
        held = run.join(tokens, self._joint()) if self.plan.joins else tokens
        with run.batch(ids):
            losses = self.losses(self.called, held)
            others = len(losses) - len(ids)
            run.backward(losses, train_weight=weights, validation_weight=1 / max(others, 1))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.options.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        loss = (losses.detach()[: len(ids)] * weights).sum() / weights.sum().clamp(min=1e-9)
        if process_count() > 1:
            distributed.all_reduce(loss)
        return loss / process_count()

    def _evaluate(self, run: Run) -> None:
        """Record the validation loss of each domain."""
        asked, corpus = self.plan.options, self.plan.corpora.val
        self.model.eval()
        with run.evaluation(), torch.no_grad():
            for domain, data in corpus.domains.items():
                rows = blocks(corpus, domain, 0, min(len(data), asked.eval_blocks))
                parts = rows.to(self.device).split(asked.batch)
                found = torch.cat([self.losses(self.model, part) for part in parts])
                run.record(**{VALIDATION + domain: found.double().mean()})
        self.model.train()

    def _batches(self) -> DataLoader[Any]:
        asked, corpus = self.plan.options, self.plan.corpora.train
        order = Batches(len(corpus), asked.batch, range(self.step, asked.steps), asked.seed)
        return loader(corpus, order, asked.workers)

    def weights(self, ids: Tensor) -> Tensor:
        """Return the weight of each sample in the loss, `[N]`."""
        kept = torch.ones(len(ids), device=self.device)
        if self.plan.without is not None:
            of = self.plan.corpora.train.domain_of
            left_out = [of(sample) == self.plan.without for sample in ids.tolist()]
            kept[torch.tensor(left_out)] = 0.0
        return kept / len(ids)

    def validation(self, domain: str) -> Tensor:
        """Return the blocks of a domain that values of this step are for, `[M, T]`.

        Each process has others, and directions are those of all of them.
        """
        count = self.plan.options.validation
        start = (self.step * process_count() + process_rank()) * count
        return blocks(self.plan.corpora.val, domain, start, count).to(self.device)

    def _joint(self) -> Tensor:
        """Return these blocks of all domains."""
        return torch.cat([self.validation(domain) for domain in self.plan.corpora.val.domains])

    def _loss_of(self, domain: str) -> Callable[[], Tensor]:
        return lambda: self.losses(self.model, self.validation(domain)).mean()

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = DTYPES[self.plan.options.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


def rate(step: int, steps: int) -> float:
    """Return what the learning rate is multiplied with: it rises, then falls to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 1 - 0.9 * (step - warm) / max(1, steps - warm)


def _model(asked: Options, vocabulary: int, length: int) -> nn.Module:
    if asked.model is not None:
        return load_causal(asked.model, vocabulary=vocabulary, length=length)
    return new_gpt2(
        asked.preset, vocabulary=vocabulary, length=length, dropout=asked.dropout, seed=asked.seed
    )
