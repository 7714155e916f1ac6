"""What the demo says about wrong labels: its claims, where they fail, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import stdev

from ghost_examples.demo.annotator import CONFUSIONS, SHARE
from ghost_examples.demo.digits import ByCount, ByMethod, DigitsResult
from ghost_examples.demo.methods import CLASSIFIERS, METHODS, TITLES

OVER_LOSS = {"precision": 0.1, "accuracy": 0.02}
"""By how much in-run values must beat the loss."""

FEW = 20
"""Up to how many clean images ghost must beat classifiers that see these alone."""

OVER_CLASSIFIERS: Mapping[str, float] = {"value": 0.05, "dot": 0.1}
"""By how much each of its scores must beat the best of them in precision."""

TIE = 0.02
"""Precisions that differ by less are called equal."""


def failures(result: DigitsResult) -> list[str]:
    """Return why the demo fails; nothing if it does not."""
    return shortfalls(result.precision, result.accuracy)


def shortfalls(precision: ByCount, accuracy: ByCount) -> list[str]:
    """Return which differences are smaller than they must be."""
    found: list[str] = []
    for n in precision:
        for what, means in (("precision", precision[n]), ("accuracy", accuracy[n])):
            found += _behind(
                f"{what} with {n} clean images", means, "value", "loss", OVER_LOSS[what]
            )
        if n <= FEW:
            best = max(CLASSIFIERS, key=precision[n].__getitem__)
            for ours, margin in OVER_CLASSIFIERS.items():
                found += _behind(
                    f"precision with {n} clean images", precision[n], ours, best, margin
                )
    return found


def _behind(what: str, means: ByMethod, ours: str, other: str, margin: float) -> Iterator[str]:
    """Yield a line if a score of ghost's does not beat another method by a margin."""
    if not means[ours] - means[other] >= margin:  # NaN is no difference
        yield (
            f"digits: {what} is {means[ours]:.3f} by {TITLES[ours]} and {means[other]:.3f} by "
            f"{TITLES[other]}: the difference must be at least {margin:g}"
        )


def suffices(precision: ByMethod) -> str:
    """Return the method that needs least of those that find as many as the best, up to `TIE`."""
    enough = max(precision.values()) - TIE
    return next(name for name in METHODS if precision[name] >= enough)


def verdicts(result: DigitsResult) -> list[str]:
    """Say for each number of clean images which way suffices, and for random mistakes."""
    found = [
        f"{n} clean images: {_verdict(precision)}" for n, precision in result.precision.items()
    ]
    flips = f"labels flipped at random, {result.counts[0]} clean images"
    return [*found, f"{flips}: {_verdict(result.random_precision)}"]


def _verdict(precision: ByMethod) -> str:
    enough, best = suffices(precision), max(precision, key=precision.__getitem__)
    words = f"{TITLES[enough]} suffices, {precision[enough]:.3f}"
    others = [name for name in (*OVER_CLASSIFIERS, best) if name != enough]
    told = [f"{TITLES[name]} {precision[name]:.3f}" for name in dict.fromkeys(others)]
    return f"{words} ({', '.join(told)})"


def cell(values: Sequence[float]) -> str:
    """Return the mean of what seeds gave and, of more than one, the standard deviation."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ±{stdev(values):.3f}"


def rows(seeds: Sequence[ByCount]) -> dict[str, list[str]]:
    """Return the cells of a table: one for each number of clean images, by method."""
    return {
        name: [cell([seed[n][name] for seed in seeds]) for n in seeds[0]]
        for name in next(iter(seeds[0].values()))
    }


def show(result: DigitsResult) -> None:
    """Print what was found."""
    pairs = ", ".join(f"{a} labelled {b}" for a, b in CONFUSIONS.items())
    mistakes = result.seeds[0].mistakes
    print(f"{SHARE:.0%} of some digits have a wrong label ({pairs}), about {mistakes} images.")
    print(f"Each method leaves out as many. {_of_seeds(len(result.seeds))}")
    for title, seeds in (
        ("Share of wrong labels among these", [seed.precision for seed in result.seeds]),
        ("Test accuracy after training without these", [seed.accuracy for seed in result.seeds]),
    ):
        _show_table(title, result.counts, rows(seeds))
    print(f"\nWhat needs least and finds as many as the best, up to {TIE:g}:")
    for line in verdicts(result):
        print(f"  {line}")


def _of_seeds(count: int) -> str:
    return "One seed." if count == 1 else f"Means ± standard deviations of {count} seeds."


def _show_table(title: str, counts: Sequence[int], cells: Mapping[str, Sequence[str]]) -> None:
    heads = [f"{n} clean" for n in counts]
    print(f"\n{title}:\n  {'':<28}" + "".join(f"{head:>14}" for head in heads))
    for name, heading in TITLES.items():
        if name in cells:
            print(f"  {heading:<28}" + "".join(f"{each:>14}" for each in cells[name]))
