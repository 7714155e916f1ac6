"""Find wrong labels with few clean images: ghost's scores against what people would do instead.

The careless annotator makes the same mistakes again and again, so that the network learns them and
their loss is low. Clean images give them away. How many it takes depends on how they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas
import torch
from torch import Tensor
from tqdm import tqdm

from ghost_engines import InRunValues
from ghost_examples.demo.annotator import Annotated, annotate, random_flips
from ghost_examples.demo.convnet import Recipe, accuracy, train, train_scored
from ghost_examples.demo.methods import METHODS, Suspects

COUNTS = (20, 40, 80, 200)
"""How many clean images the methods get."""

ByMethod = Mapping[str, float]
ByCount = Mapping[int, ByMethod]
"""Shares by the number of clean images, then by method."""


@dataclass(frozen=True)
class Flagged:
    """An image that was left out for its value.

    Attributes:
        id: Its number among the training images.
        pixels: Grey values from 0 to 1, `[8, 8]`.
        given: The label that it was given.
        truth: Its true label.
        value: Its in-run value.
    """

    id: int
    pixels: Tensor
    given: int
    truth: int
    value: float

    @property
    def is_mistake(self) -> bool:
        """Whether the label is wrong."""
        return self.given != self.truth


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave.

    Attributes:
        mistakes: Number of wrong labels, which is also how many images each method leaves out.
        precision: Share of wrong labels among the images that a method left out.
        accuracy: Accuracy on the test images after training without these; bounds too.
        random_precision: Precision if the annotator errs at random instead, fewest clean images.
        flagged: The images with the lowest values by the fewest clean images, lowest first.
        table: Every training image: id, value, times_seen, first_step, last_step, given, truth.
    """

    mistakes: int
    precision: ByCount
    accuracy: ByCount
    random_precision: ByMethod
    flagged: Sequence[Flagged]
    table: pandas.DataFrame


@dataclass(frozen=True)
class DigitsResult:
    """What all seeds gave."""

    recipe: Recipe
    seeds: Sequence[SeedResult]

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of clean images, fewest first."""
        return tuple(self.seeds[0].precision)

    @property
    def precision(self) -> dict[int, dict[str, float]]:
        """Mean precision."""
        return {n: _means([seed.precision[n] for seed in self.seeds]) for n in self.counts}

    @property
    def accuracy(self) -> dict[int, dict[str, float]]:
        """Mean accuracy."""
        return {n: _means([seed.accuracy[n] for seed in self.seeds]) for n in self.counts}

    @property
    def random_precision(self) -> dict[str, float]:
        """Mean precision by method where labels are flipped at random."""
        return _means([seed.random_precision for seed in self.seeds])


class Trial:
    """One seed: its images, and the training runs that were made with them.

    Args:
        seed: Decides the split, the mistakes and the training.
        recipe: How networks are trained.
        device: Where to compute.
        bar: Counts training runs, of which there are `runs(counts)`.
    """

    def __init__(self, seed: int, recipe: Recipe, device: str, bar: tqdm) -> None:
        self.seed, self.recipe, self.device, self.bar = seed, recipe, device, bar
        self.data = annotate(seed, device=device)
        self.wrong = self.data.mislabelled

    def run(self, counts: Sequence[int]) -> SeedResult:
        """Compare all methods, each with every count of clean images."""
        data = self.data
        model, values = train_scored(data, counts, self.recipe, self.seed, self.device)
        self.bar.update()
        suspects = Suspects(data.train, model, self.seed, self.device)
        unaided = {name: self.chosen(scores) for name, scores in suspects.unaided().items()}
        bounds = {
            "untouched": accuracy(model, data.test),
            "oracle": self.without(self.wrong.nonzero()[:, 0]),
        }
        unaided_accuracy = {name: self.without(chosen) for name, chosen in unaided.items()}
        precision, accuracies = {}, {}
        for n in counts:
            adapted = suspects.adapted(data.clean[:n])
            scores = suspects.aided(data.clean[:n], adapted, values[n])
            aided = {name: self.chosen(each) for name, each in scores.items()}
            precision[n] = _in_order({**aided, **unaided}, self.wrong)
            accuracies[n] = {name: self.without(chosen) for name, chosen in aided.items()}
            accuracies[n] |= {**unaided_accuracy, **bounds}
            accuracies[n]["adapted"] = accuracy(adapted, data.test)
        fewest = values[counts[0]]
        flagged = self.chosen(-torch.tensor([fewest[i] for i in range(len(data.train))]))
        return SeedResult(
            mistakes=int(self.wrong.sum()),
            precision=precision,
            accuracy=accuracies,
            random_precision=self.at_random(counts[0]),
            flagged=[_described(data, fewest, int(i)) for i in flagged],
            table=_table(data, fewest),
        )

    def chosen(self, suspicion: Tensor) -> Tensor:
        """Return the most suspicious images, as many as there are wrong labels."""
        return suspicion.argsort(descending=True, stable=True)[: int(self.wrong.sum())]

    def without(self, left_out: Tensor) -> float:
        """Return the test accuracy of a network that is trained without some images."""
        kept = torch.ones(len(self.wrong), dtype=torch.bool)
        kept[left_out] = False
        images = self.data.train[kept.nonzero()[:, 0]]
        retrained = train(images, self.recipe, self.seed, self.device)
        self.bar.update()
        return accuracy(retrained, self.data.test)

    def at_random(self, n: int) -> dict[str, float]:
        """Return the precision of all methods where labels are flipped at random."""
        data = annotate(self.seed, random_flips, device=self.device)
        model, values = train_scored(data, [n], self.recipe, self.seed, self.device)
        self.bar.update()
        suspects = Suspects(data.train, model, self.seed, self.device)
        adapted = suspects.adapted(data.clean[:n])
        scores = {**suspects.unaided(), **suspects.aided(data.clean[:n], adapted, values[n])}
        chosen = {name: self.chosen(each) for name, each in scores.items()}
        return _in_order(chosen, data.mislabelled)


def runs(counts: Sequence[int]) -> int:
    """Return the training runs per seed: two scored ones, the oracle's, and one for each choice."""
    aided = sum(method.needs_clean for method in METHODS.values())
    return 2 + 1 + (len(METHODS) - aided) + aided * len(counts)


def run(
    seeds: int, device: str, recipe: Recipe | None = None, counts: Sequence[int] = COUNTS
) -> DigitsResult:
    """Run the experiment for seeds 0, 1, ... with a progress bar."""
    recipe, counts = recipe or Recipe(), sorted(set(counts))
    with tqdm(total=seeds * runs(counts), desc="training runs", disable=None) as bar:
        found = [Trial(seed, recipe, device, bar).run(counts) for seed in range(seeds)]
    return DigitsResult(recipe, found)


def _in_order(chosen: Mapping[str, Tensor], wrong: Tensor) -> dict[str, float]:
    """Return the precision by method, in the order of METHODS."""
    return {name: wrong[chosen[name]].float().mean().item() for name in METHODS}


def _described(data: Annotated, values: InRunValues, i: int) -> Flagged:
    pixels, given = data.train.images[i, 0].cpu(), int(data.train.labels[i])
    return Flagged(i, pixels, given, int(data.truth[i]), values[i])


def _table(data: Annotated, values: InRunValues) -> pandas.DataFrame:
    table = values.to_pandas()
    table["given"] = data.train.labels.cpu().numpy()[table["id"]]
    table["truth"] = data.truth.cpu().numpy()[table["id"]]
    return table


def _means(results: Sequence[ByMethod]) -> dict[str, float]:
    return {name: fmean(result[name] for result in results) for name in results[0]}
