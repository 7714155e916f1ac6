"""Trains a language model on some of the candidates of each step, chosen in several ways.

The candidates come from four domains of text, and one of these is what the model should be good
at. `TopK` and `Greedy` choose by how a step on a candidate would change the loss of a few passages
of that domain; others choose at random or by the candidates' own loss. All ways train on as many
passages, and the loss is measured on other passages of the domain:

    python -m ghost_examples.lm_selection
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ghost_core import CaptureError
from ghost_engines import DotProductEngine
from ghost_examples.choosing import WAYS, Step
from ghost_examples.command_line import read_options
from ghost_examples.language_models import (
    EMBEDDED,
    Corpora,
    blocks,
    new_gpt2,
    open_corpora,
    per_sample_loss,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison.

    Attributes:
        output: Where the plot and the corpus go.
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


def train(name: str, corpora: Corpora, asked: Options, seed: int) -> Outcome:
    """Train a new model on what one way chooses."""
    corpus = corpora.train
    model = new_gpt2(asked.preset, vocabulary=corpus.vocabulary, length=corpus.length, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), asked.lr, (0.9, 0.95), weight_decay=0.0)
    known = blocks(corpora.val, asked.target, 0, asked.known)
    test = blocks(corpora.val, asked.target, asked.known, asked.test)
    engine = DotProductEngine(model)
    engine.add_direction("known", lambda: per_sample_loss(model, known).mean())
    drawn, chance = (torch.Generator().manual_seed(2 * seed + at) for at in (0, 1))
    losses, own, rate = {0: _loss(model, test)}, [], 0.0
    with engine:
        for number in range(1, asked.steps + 1):
            at = torch.randperm(len(corpus), generator=drawn)[: asked.candidates].tolist()
            samples = [corpus[each] for each in at]
            ids = torch.tensor([each["sample_id"] for each in samples])
            tokens = torch.stack([each["input_ids"] for each in samples])
            step = Step(
                engine, partial(per_sample_loss, model, tokens), ids, asked.chosen, rate, chance
            )
            chosen = WAYS[name](step)
            own += [corpus.domain_of(each) == asked.target for each in ids[chosen].tolist()]
            optimizer.zero_grad()
            per_sample_loss(model, tokens[chosen]).mean().backward()
            gradient = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = nn.utils.parameters_to_vector(model.parameters()).detach()
            optimizer.step()
            after = nn.utils.parameters_to_vector(model.parameters()).detach()
            # How far the step went, over the norm of its gradient: AdamW's rate says nothing of it.
            rate = float((after - before).norm() / gradient)
            if number % max(1, asked.steps // 6) == 0 or number == asked.steps:
                losses[number] = _loss(model, test)
    return Outcome(losses, fmean(own))


def run(asked: Options) -> dict[str, list[Outcome]]:
    """Train in all ways with all seeds; print a row for each way, and draw the losses."""
    asked.output.mkdir(parents=True, exist_ok=True)
    corpora = open_corpora(asked.corpus, (), asked.length, asked.output)
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


def _loss(model: nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(per_sample_loss(model, tokens).mean())


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    run(read_options(Options, arguments, name="lm_selection", description=__doc__))


if __name__ == "__main__":
    main()
