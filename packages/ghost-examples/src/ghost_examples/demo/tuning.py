"""How the other ways got their settings: `python -m ghost_examples.demo.tuning`.

Prints for each setting which share of the wrong labels it finds, and marks those that the demo
uses: the best ones on average over the numbers of clean images. The seeds are none of the demo's.
Takes a few minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ghost_examples.demo import baselines
from ghost_examples.demo.annotator import Annotated, Images, annotate
from ghost_examples.demo.baselines import Fitting, Machine
from ghost_examples.demo.convnet import Recipe, train
from ghost_examples.demo.digits import COUNTS
from ghost_examples.demo.threads import one_thread

SEEDS = range(100, 104)


@dataclass(frozen=True)
class Case:
    """What a method is asked about: a training set, a network trained on it, clean images."""

    seed: int
    data: Annotated
    model: nn.Module
    clean: Images

    def precision(self, ask: Ask, setting: Any) -> float:
        """Return the share of wrong labels among the most suspicious ones."""
        wrong = self.data.mislabelled
        found = ask(self, setting).argsort(descending=True, stable=True)[: int(wrong.sum())]
        return wrong[found].float().mean().item()


Ask = Callable[[Case, Any], Tensor]


@dataclass(frozen=True)
class Grid:
    """Settings to choose from.

    Attributes:
        ask: Returns how suspicious each image is by a setting, `[n]`.
        settings: To try.
        chosen: What the demo uses.
    """

    ask: Ask
    settings: Sequence[Any]
    chosen: Any


def _further(case: Case, setting: Fitting) -> Tensor:
    adapted = baselines.fitted_further(case.model, case.clean, case.seed, "cpu", setting)
    return baselines.rise(case.model, adapted, case.data.train)


WIDTHS: tuple[float | str, ...] = ("scale", 0.01, 0.03)

GRIDS: Mapping[str, Grid] = {
    "neighbours": Grid(
        lambda case, setting: baselines.neighbours(case.clean, case.data.train, setting),
        (1, 2),
        baselines.NEIGHBOURS,
    ),
    "machine": Grid(
        lambda case, setting: baselines.machine(case.clean, case.data.train, setting),
        [Machine(cost, width) for cost, width in product((1.0, 10.0, 100.0), WIDTHS)],
        baselines.ON_CLEAN,
    ),
    "alone": Grid(
        lambda case, setting: baselines.alone(
            case.clean, case.data.train, case.seed, "cpu", setting
        ),
        [Fitting(*each) for each in product((300, 1000), (0.1, 0.3), (0.0, 0.01))],
        baselines.ALONE,
    ),
    "further": Grid(
        _further,
        [Fitting(*each) for each in product((10, 30, 100), (0.03, 0.1, 0.3))],
        baselines.FURTHER,
    ),
    "crossed": Grid(
        lambda case, setting: baselines.cross_validated(case.data.train, setting),
        [Machine(cost, width) for cost, width in product((0.5, 1.0, 2.0, 10.0), WIDTHS)],
        baselines.ON_GIVEN,
    ),
}


def cases(seeds: Sequence[int] = SEEDS, counts: Sequence[int] = COUNTS) -> list[list[Case]]:
    """Return the cases by the number of clean images."""
    found: list[list[Case]] = [[] for _ in counts]
    for seed in seeds:
        data = annotate(seed)
        model = train(data.train, Recipe(), seed, "cpu")
        for n, each in zip(counts, found, strict=True):
            each.append(Case(seed, data, model, data.clean[:n]))
    return found


def compare(grid: Grid, by_count: Sequence[Sequence[Case]]) -> dict[Any, list[float]]:
    """Return the mean precision of each setting, by the number of clean images."""
    return {
        setting: [fmean(case.precision(grid.ask, setting) for case in each) for each in by_count]
        for setting in grid.settings
    }


def main() -> None:
    """Try all settings and print what they find."""
    with one_thread():
        by_count = cases()
        for name, grid in tqdm(GRIDS.items(), desc="methods", disable=None):
            found = compare(grid, by_count)
            best = max(found, key=lambda setting: fmean(found[setting]))
            tqdm.write(f"\n{name}: precision with {', '.join(map(str, COUNTS))} clean images; mean")
            for setting, shares in found.items():
                marks = " best" * (setting == best) + " used" * (setting == grid.chosen)
                row = " ".join(f"{share:.3f}" for share in shares)
                tqdm.write(f"  {setting!s:<60} {row}  {fmean(shares):.3f}{marks}")


if __name__ == "__main__":
    main()
