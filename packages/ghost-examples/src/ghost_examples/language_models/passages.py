"""The passages that helped a run most and least, with their text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ghost_engines import ValueTable
from ghost_examples.language_models.data import Corpora

_WIDTH = 90


@dataclass(frozen=True)
class Valued:
    """A passage and what it was worth.

    Attributes:
        sample: Its id.
        domain: Its domain.
        value: How much it lowered the validation loss.
        text: What it says; its token ids, where no tokenizer is known.
    """

    sample: int
    domain: str
    value: float
    text: str

    @property
    def line(self) -> str:
        """A line that shows its beginning."""
        start = " ".join(self.text.split())
        start = start if len(start) <= _WIDTH else start[: _WIDTH - 1] + "…"
        return f"  {self.value:+.5f}  {self.domain:<12} {start}"


@dataclass(frozen=True)
class Extremes:
    """The passages that were worth most and least for one target.

    Attributes:
        target: Name of the validation domain, or "all of them".
        most: The highest first.
        least: The lowest first.
    """

    target: str
    most: list[Valued]
    least: list[Valued]


def extremes(values: ValueTable, corpora: Corpora, count: int) -> Iterator[Extremes]:
    """Yield the most and least valuable passages, for the sum over all targets, then for each.

    Passages that nothing was credited to, as in a first step of Adam, are neither.

    Args:
        values: Values of a run.
        corpora: What it was trained on.
        count: How many of each.
    """
    tokenizer = corpora.tokenizer
    columns = {name: values.values[:, at] for at, name in enumerate(values.directions)}
    if len(columns) > 1:
        columns = {"all of them": values.values.sum(1), **columns}
    for target, column in columns.items():
        order = np.argsort(-column, kind="stable")
        order = order[column[order] != 0]

        def valued(at: int, column: np.ndarray = column) -> Valued:
            sample = int(values.ids[at])
            tokens = corpora.train.by_id(sample).tolist()
            text = str(tokens) if tokenizer is None else tokenizer.decode(tokens)
            return Valued(sample, corpora.train.domain_of(sample), float(column[at]), text)

        yield Extremes(
            target,
            most=[valued(at) for at in order[:count].tolist()],
            least=[valued(at) for at in order[::-1][:count].tolist()],
        )


def short(found: Extremes) -> str:
    """Return the passages for one target, a line each."""
    most, least = (
        "\n".join(each.line for each in passages) or "  none: no step credited any"
        for passages in (found.most, found.least)
    )
    return (
        f"Most valuable passages, for {found.target}:\n{most}\n\n"
        f"Least valuable passages, for {found.target}:\n{least}"
    )


def whole(found: Extremes) -> str:
    """Return the passages for one target with all of their text, as Markdown."""
    parts = [f"## For {found.target}"]
    for name, passages in (("Most", found.most), ("Least", found.least)):
        parts.append(f"### {name} valuable")
        for each in passages:
            quoted = "\n".join(f"    {line}" for line in each.text.splitlines())
            parts.append(f"{each.value:+.6f}, {each.domain}, sample {each.sample}\n\n{quoted}")
    return "\n\n".join(parts) + "\n"
