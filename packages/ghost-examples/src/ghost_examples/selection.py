"""Trains on some of the candidates of each batch, chosen in several ways, at equal samples.

Many labels are wrong. A few clean images say what the model should be good at: ghost's policies
choose by how a step on a candidate would change their loss. Others choose at random, or by the
candidates' own loss; one trains on the clean images alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ghost_engines import Run
from ghost_examples import mlp
from ghost_examples.choosing import WAYS, Way
from ghost_examples.command_line import read_options
from ghost_examples.mlp import Digits, loss_of


@dataclass(frozen=True)
class Options:
    """Options of the comparison.

    Attributes:
        seeds: Runs of each way; they share data, parameters and candidates seed by seed.
        steps: Training steps.
        candidates: Candidates in each step.
        chosen: How many of these are trained on.
        clean: Images with right labels.
        wrong: Share of the training labels that are wrong.
        lr: Learning rate of plain gradient descent.
    """

    seeds: int = 5
    steps: int = 200
    candidates: int = 64
    chosen: int = 16
    clean: int = 40
    wrong: float = 0.4
    lr: float = 0.1


@dataclass(frozen=True)
class Task:
    """What one seed trains on and is judged by.

    Attributes:
        train: Images with the labels that they were given.
        is_wrong: Which of these are wrong, bool `[n]`.
        clean: Images with right labels.
        test: Images that nothing is decided with.
    """

    train: Digits
    is_wrong: Tensor
    clean: Digits
    test: Digits


def task(options: Options, seed: int) -> Task:
    """Split the digits, and give wrong labels to some."""
    train, rest = mlp.load(mlp.Options(val_batch=options.clean + 400, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    wrong = order[: round(options.wrong * len(train))]
    labels = train.labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    is_wrong = labels != train.labels
    given = replace(train, labels=labels)
    return Task(given, is_wrong, rest[: options.clean], rest[options.clean :])


def convnet(seed: int) -> nn.Sequential:
    """Return a small convolutional network with parameters drawn from a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def losses(model: nn.Module, digits: Digits) -> Tensor:
    """Return the own loss of each image, `[N]`."""
    return cross_entropy(model(digits.inputs), digits.labels, reduction="none")


CLEAN = "clean alone"
"""Trains on as many clean images in each step, and on no candidate."""


@dataclass(frozen=True)
class Outcome:
    """What training one way came to.

    Attributes:
        accuracy: On the test images.
        wrong: Share of wrong labels among those trained on.
    """

    accuracy: float
    wrong: float


def train(name: str, found: Task, options: Options, seed: int, folder: Path) -> Outcome:
    """Train a new network on what one way chooses, in a folder of its own."""
    model = convnet(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    way = Way() if name == CLEAN else WAYS[name]
    config = way.config(folder / f"{name}-{seed}", options.chosen)
    targets = {"clean": partial(loss_of, model, found.clean)}
    drawn, chance = (torch.Generator().manual_seed(2 * seed + at) for at in (0, 1))
    wrong = []
    with Run(model, optimizer, config, directions=targets) as run:
        for _ in range(options.steps):
            ids = torch.randperm(len(found.train), generator=drawn)[: options.candidates]
            if name == CLEAN:
                order = torch.randperm(len(found.clean), generator=chance)
                batch = found.clean[order[: options.chosen]]
                wrong.append(0.0)
            else:
                own = partial(losses, model, found.train[ids])
                chosen = ids[way.choose(run, own, ids, options.chosen, options.lr)]
                batch = found.train[chosen]
                wrong.append(float(found.is_wrong[chosen].float().mean()))
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    with torch.no_grad():
        right = model(found.test.inputs).argmax(1) == found.test.labels
    return Outcome(float(right.float().mean()), fmean(wrong))


def run(options: Options) -> dict[str, list[Outcome]]:
    """Train in all ways with all seeds, and print a row for each way."""
    found: dict[str, list[Outcome]] = {}
    tasks = [task(options, seed) for seed in range(options.seeds)]
    print(f"{'chosen':<14}{'test accuracy':>16}{'wrong labels':>15}")
    for name in (*WAYS, CLEAN):
        with TemporaryDirectory() as folder:
            place = Path(folder)
            found[name] = [
                train(name, each, options, seed, place) for seed, each in enumerate(tasks)
            ]
        accuracy = [each.accuracy for each in found[name]]
        spread = f" ± {stdev(accuracy):.1%}" if len(accuracy) > 1 else ""
        wrong = fmean(each.wrong for each in found[name])
        print(f"{name:<14}{f'{fmean(accuracy):.1%}{spread}':>16}{wrong:>15.1%}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    run(read_options(Options, arguments, name="selection", description=__doc__))


if __name__ == "__main__":
    main()
