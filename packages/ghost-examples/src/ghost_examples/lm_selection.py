"""Trains a language model on some of the candidates of each step, chosen in several ways.

The candidates come from four domains of text, and one of these is what the model should be good
at. `TopK` and `Greedy` choose by how a step on a candidate would change the loss of a few passages
of that domain; others choose at random or by the candidates' own loss. All ways train on as many
passages, and the loss is measured on other passages of the domain:

    python -m ghost_examples.lm_selection

Each way is a `Run` in a folder of its own: what was stopped goes on where it was.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ghost_core import CaptureError, UnknownNameError
from ghost_engines import Run, TokenCorpus, take_ids
from ghost_examples.choosing import WAYS
from ghost_examples.command_line import read_options, refusals
from ghost_examples.kept_options import check_options
from ghost_examples.language_models import (
    EMBEDDED,
    Batches,
    Corpora,
    blocks,
    loader,
    new_gpt2,
    open_corpora,
    per_sample_loss,
)

RUNS = "runs"
"""The folder of the runs, one for each way and seed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison.

    Attributes:
        output: Where the plot, the corpus and the runs go. Runs that are there are gone on with.
        corpus: "embedded", or a folder that `python -m ghost_examples.tokenize` has written.
        target: The domain that the model should be good at.
        seeds: Runs of each way; they share parameters and candidates seed by seed.
        steps: Training steps.
        candidates: Candidates in each step.
        chosen: How many of these are trained on.
        known: Passages of the target that choices are made by.
        test: Passages of the target that the loss is measured on; none of the known ones.
        length: Tokens of a passage, for the embedded corpus.
        lr: Learning rate of AdamW.
        preset: Size of the GPT-2.
    """

    output: Path = Path("lm-selection")
    corpus: str = EMBEDDED
    target: str = "python"
    seeds: int = 2
    steps: int = 50
    candidates: int = 16
    chosen: int = 4
    known: int = 4
    test: int = 24
    length: int = 64
    lr: float = 3e-3
    preset: str = "tiny"

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "chosen", "known", "test"):
            if getattr(self, name) < 1:
                raise CaptureError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.candidates < self.chosen:
            raise CaptureError(f"{self.chosen} cannot be chosen out of {self.candidates}")


@dataclass(frozen=True)
class Outcome:
    """What training one way came to.

    Attributes:
        losses: Loss of the test passages by step, before the first and then now and then.
        share: Share of the target's own passages among those trained on.
    """

    losses: dict[int, float]
    share: float

    @property
    def last(self) -> float:
        """The loss after training."""
        return self.losses[max(self.losses)]


class Stride:
    """Makes steps, and knows how far they go: AdamW's learning rate does not say.

    Args:
        model: The model.
        optimizer: Its optimizer.

    Attributes:
        rate: How far the last step went, over the norm of its gradient.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.rate = 0.0

    def step(self) -> None:
        """Clip the gradient, and step."""
        gradient = nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        before = nn.utils.parameters_to_vector(self._model.parameters()).detach()
        self._optimizer.step()
        after = nn.utils.parameters_to_vector(self._model.parameters()).detach()
        self.rate = float((after - before).norm() / gradient)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to know."""
        return {"rate": self.rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rate = state["rate"]


def train(name: str, corpora: Corpora, asked: Options, seed: int) -> Outcome:
    """Train a new model on what one way chooses, or go on where that was stopped."""
    way, corpus = WAYS[name], corpora.train
    model = new_gpt2(asked.preset, vocabulary=corpus.vocabulary, length=corpus.length, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), asked.lr, (0.9, 0.95), weight_decay=0.0)
    stride = Stride(model, optimizer)
    saved: dict[str, Any] = {"model": model, "optimizer": optimizer, "stride": stride}
    known = blocks(corpora.val, asked.target, 0, asked.known)
    test = blocks(corpora.val, asked.target, asked.known, asked.test)
    config = way.config(asked.output / RUNS / f"{name.replace(' ', '-')}-{seed}", asked.chosen)
    targets = {"known": lambda: per_sample_loss(model, known).mean()}
    with Run(model, optimizer, config, directions=targets) as run:
        if run.resume(**saved) == 0:
            run.record(loss=_loss(run, model, test))
        order = Batches(len(corpus), asked.candidates, range(run.steps, asked.steps), seed)
        for batch in loader(corpus, order, 0):
            ids, tokens = take_ids(batch), batch["input_ids"]
            own = partial(per_sample_loss, model, tokens)
            chosen = way.choose(run, own, ids, asked.chosen, stride.rate)
            optimizer.zero_grad()
            per_sample_loss(model, tokens[chosen]).mean().backward()
            stride.step()
            run.record(share=_share(corpus, ids[chosen], asked.target))
            if run.steps % max(1, asked.steps // 6) == 0 or run.steps == asked.steps:
                run.record(loss=_loss(run, model, test))
                run.save(**saved)
    return _outcome(run.folder)


def run(asked: Options) -> dict[str, list[Outcome]]:
    """Train in all ways with all seeds; print a row for each way, and draw the losses."""
    begun = (asked.output / RUNS).exists()
    check_options(asked, asked.output, free=("output", "seeds"), flag="--output", begun=begun)
    corpora = open_corpora(asked.corpus, (), asked.length, asked.output)
    if asked.target not in corpora.val.domains:
        raise UnknownNameError("target", asked.target, corpora.val.domains)
    there = len(corpora.val.domains[asked.target])
    if there < asked.known + asked.test:
        raise CaptureError(
            f"{asked.target} has {there} passages for validation, and {asked.known} + {asked.test} "
            "are asked for"
        )
    found: dict[str, list[Outcome]] = {}
    print(f"{'chosen':<14}{f'loss on {asked.target}':>24}{'of the target':>16}")
    for name in WAYS:
        found[name] = [train(name, corpora, asked, seed) for seed in range(asked.seeds)]
        last = [each.last for each in found[name]]
        spread = f" ± {stdev(last):.3f}" if len(last) > 1 else ""
        share = fmean(each.share for each in found[name])
        print(f"{name:<14}{f'{fmean(last):.3f}{spread}':>24}{share:>16.1%}", flush=True)
    draw(found, asked)
    print((asked.output / "selection.png").absolute())
    return found


def draw(found: Mapping[str, list[Outcome]], asked: Options) -> None:
    """Draw the loss of each way over the passages trained on, to `selection.png`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for at, (name, outcomes) in enumerate(found.items()):
        steps = [*outcomes[0].losses]
        means = [fmean(each.losses[step] for each in outcomes) for step in steps]
        passages = [step * asked.chosen for step in steps]
        axes.plot(passages, means, marker="o", color=f"C{at}", label=name)
    axes.set(xlabel="passages trained on", ylabel=f"loss on {asked.target}, nats per token")
    axes.legend(title="chosen")
    figure.savefig(asked.output / "selection.png", dpi=120)


def _loss(run: Run, model: nn.Module, tokens: Tensor) -> float:
    with run.evaluation(), torch.no_grad():
        return float(per_sample_loss(model, tokens).mean())


def _share(corpus: TokenCorpus, ids: Tensor, target: str) -> float:
    return fmean(corpus.domain_of(each) == target for each in ids.tolist())


def _outcome(folder: Path) -> Outcome:
    """Read what a run has recorded."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    losses = {each["step"]: each["loss"] for each in entries if "loss" in each}
    return Outcome(losses, fmean(each["share"] for each in entries if "share" in each))


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line; exits with 2 where options or data do not fit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with refusals():
        run(read_options(Options, arguments, name="lm_selection", description=__doc__))


if __name__ == "__main__":
    main()
