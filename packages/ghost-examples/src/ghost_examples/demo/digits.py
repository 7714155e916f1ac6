"""Find wrong labels: one training run, scored on the way, against the loss and the gradient norm.

The careless annotator makes the same mistakes again and again, so that the network learns them and
their loss is low. What gives them away is that they raise the loss on clean validation images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ghost_engines import InRunValues
from ghost_examples.demo.annotator import (
    CONFUSIONS,
    SHARE,
    Annotated,
    Images,
    annotate,
    random_flips,
)
from ghost_examples.demo.convnet import Recipe, accuracy, losses_and_norms, train, train_scored

METHODS: Mapping[str, str] = {
    "value": "in-run value",
    "loss": "loss",
    "norm": "gradient norm",
    "random": "random choice",
}
"""Ways to choose the images to leave out, with their titles."""

BOUNDS: Mapping[str, str] = {"untouched": "nothing left out", "oracle": "all mistakes left out"}
"""What the accuracies are compared with."""

PRECISION_MARGIN = 0.1
ACCURACY_MARGIN = 0.02


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
        accuracy: Accuracy on the test images after training without these.
        random_precision: Precision of value and loss if the annotator errs at random instead.
        flagged: The images with the lowest values, lowest first.
        table: Every training image: id, value, times_seen, first_step, last_step, given, truth.
    """

    mistakes: int
    precision: Mapping[str, float]
    accuracy: Mapping[str, float]
    random_precision: Mapping[str, float]
    flagged: Sequence[Flagged]
    table: pandas.DataFrame


@dataclass(frozen=True)
class DigitsResult:
    """What all seeds gave."""

    recipe: Recipe
    seeds: Sequence[SeedResult]

    @property
    def precision(self) -> dict[str, float]:
        """Mean precision by method."""
        return _means([seed.precision for seed in self.seeds])

    @property
    def accuracy(self) -> dict[str, float]:
        """Mean accuracy by method and bound."""
        return _means([seed.accuracy for seed in self.seeds])

    @property
    def random_precision(self) -> dict[str, float]:
        """Mean precision by method where labels are flipped at random."""
        return _means([seed.random_precision for seed in self.seeds])

    @property
    def about_random_flips(self) -> str:
        """Say how far the loss alone gets where labels are flipped at random."""
        value, loss = self.random_precision["value"], self.random_precision["loss"]
        suffices = " There the plain loss suffices." if loss >= value else ""
        return (
            "As many labels flipped at random instead: precision by value "
            f"{value:.3f}, by loss {loss:.3f}.{suffices}"
        )

    @property
    def failures(self) -> list[str]:
        """Why the demo fails; nothing if it does not."""
        return shortfalls(self.precision, self.accuracy)


def shortfalls(precision: Mapping[str, float], accuracy: Mapping[str, float]) -> list[str]:
    """Return in which respects values do not beat the loss by the margins."""
    margins = {"precision": PRECISION_MARGIN, "accuracy": ACCURACY_MARGIN}
    found = []
    for (name, margin), means in zip(margins.items(), (precision, accuracy), strict=True):
        if not means["value"] - means["loss"] >= margin:
            found.append(
                f"digits: {name} by value is {means['value']:.3f}, by loss {means['loss']:.3f}: "
                f"the difference must be at least {margin:g}"
            )
    return found


def suspicion(
    model: nn.Module, values: InRunValues, images: Images, seed: int
) -> dict[str, Tensor]:
    """Return by method how suspicious each image is, `[n]`: the higher, the more."""
    losses, norms = losses_and_norms(model, images)
    by_id = values.to_dict()
    return {
        "value": -torch.tensor([by_id[i] for i in range(len(images))]),
        "loss": losses,
        "norm": norms,
        "random": torch.rand(len(images), generator=torch.Generator().manual_seed(seed)),
    }


def run_seed(seed: int, recipe: Recipe, device: str, bar: tqdm) -> SeedResult:
    """Run the experiment once; the bar counts training runs, of which there are `RUNS`."""
    data = annotate(seed, device=device)
    wrong = data.mislabelled
    count = int(wrong.sum())
    model, values = train_scored(data, recipe, seed, device)
    bar.update()
    flagged = {
        method: score.argsort(descending=True, stable=True)[:count]
        for method, score in suspicion(model, values, data.train, seed).items()
    }
    accuracies = {"untouched": accuracy(model, data.test)}
    for name, left_out in {**flagged, "oracle": wrong.nonzero()[:, 0]}.items():
        kept = torch.ones(len(wrong), dtype=torch.bool)
        kept[left_out] = False
        retrained = train(data.train[kept.nonzero()[:, 0]], recipe, seed, device)
        accuracies[name] = accuracy(retrained, data.test)
        bar.update()
    at_random = random_precision(seed, recipe, device)
    bar.update()
    return SeedResult(
        mistakes=count,
        precision={name: wrong[ids].float().mean().item() for name, ids in flagged.items()},
        accuracy=accuracies,
        random_precision=at_random,
        flagged=[_described(data, values, int(i)) for i in flagged["value"]],
        table=_table(data, values),
    )


RUNS = 2 + len(METHODS) + 1
"""Training runs per seed: two scored ones, one per method and the oracle's."""


def random_precision(seed: int, recipe: Recipe, device: str) -> dict[str, float]:
    """Return the precision of value and loss where labels are flipped at random."""
    data = annotate(seed, random_flips, device=device)
    wrong = data.mislabelled
    model, values = train_scored(data, recipe, seed, device)
    found = suspicion(model, values, data.train, seed)
    top = {name: found[name].topk(int(wrong.sum())).indices for name in ("value", "loss")}
    return {name: wrong[ids].float().mean().item() for name, ids in top.items()}


def run(seeds: int, device: str, recipe: Recipe | None = None) -> DigitsResult:
    """Run the experiment for seeds 0, 1, ... with a progress bar."""
    recipe = recipe or Recipe()
    with tqdm(total=seeds * RUNS, desc="training runs", disable=None) as bar:
        found = [run_seed(seed, recipe, device, bar) for seed in range(seeds)]
    return DigitsResult(recipe, found)


def show(result: DigitsResult) -> None:
    """Print what was found."""
    pairs = ", ".join(f"{a} labelled {b}" for a, b in CONFUSIONS.items())
    mistakes = result.seeds[0].mistakes
    print(f"{SHARE:.0%} of some digits have a wrong label ({pairs}), about {mistakes} images.")
    print(f"As many are left out by each method; means over {len(result.seeds)} seeds:")
    print(f"  {'':<22} precision  test accuracy after retraining")
    for name, title in {**METHODS, **BOUNDS}.items():
        precision = f"{result.precision[name]:.3f}" if name in result.precision else ""
        print(f"  {title:<22} {precision:>9}  {result.accuracy[name]:.3f}")
    print(result.about_random_flips)


def _described(data: Annotated, values: InRunValues, i: int) -> Flagged:
    pixels, given = data.train.images[i, 0].cpu(), int(data.train.labels[i])
    return Flagged(i, pixels, given, int(data.truth[i]), values[i])


def _table(data: Annotated, values: InRunValues) -> pandas.DataFrame:
    table = values.to_pandas()
    table["given"] = data.train.labels.cpu().numpy()[table["id"]]
    table["truth"] = data.truth.cpu().numpy()[table["id"]]
    return table


def _means(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(result[name] for result in results) for name in results[0]}
