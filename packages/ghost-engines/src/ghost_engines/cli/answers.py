"""What `ghost query` found, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ghost_engines.cli.tables import print_table

_LONGEST = 100
"""Characters of a text in a table."""


@dataclass(frozen=True)
class Asked:
    """What was searched, and how.

    Attributes:
        store: The store, as it was given.
        model: The model.
        loss: What the loss is.
        rows: Number of rows.
        by: How they were compared.
        parameters: Globs over what was compared; None for all.
        smallest: Whether the smallest scores were looked for.
    """

    store: str
    model: str
    loss: str
    rows: int
    by: str
    parameters: str | None
    smallest: bool


@dataclass(frozen=True)
class Found:
    """A sample that was found.

    Attributes:
        id: Its id.
        score: Its score.
        group: Its group, if the store has any.
        text: Its text, if that is known.
        layers: What each layer adds to the score, if that was asked for.
    """

    id: int
    score: float
    group: str | None = None
    text: str | None = None
    layers: Mapping[str, float] = field(default_factory=dict)

    @property
    def sign(self) -> str:
        """What a small step on the sample does to the query's loss."""
        return "helps" if self.score > 0 else "hurts" if self.score < 0 else "neither"


@dataclass(frozen=True)
class Answer:
    """What was found for a query, best first.

    Attributes:
        text: The query, if it is a text.
        found: The samples.
    """

    text: str | None
    found: Sequence[Found]


def as_json(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return everything as JSON-able values."""
    return {
        **asdict(asked),
        "queries": [
            {
                "text": answer.text,
                "found": [{**asdict(each), "sign": each.sign} for each in answer.found],
            }
            for answer in answers
        ],
    }


def print_answers(asked: Asked, answers: Sequence[Answer]) -> None:
    """Print what was searched, what was found, and what each layer adds if that is known."""
    summary = [
        ("store", f"{asked.store} ({asked.rows} rows)"),
        ("model", asked.model),
        ("loss", asked.loss),
        ("by", asked.by + (", the smallest" if asked.smallest else "")),
        ("parameters", asked.parameters or "all"),
        *((f"query {at}", shortened(answer.text or "-")) for at, answer in enumerate(answers)),
    ]
    print_table(("property", "value"), summary)
    print()
    print_table(("query", "rank", "score", "sign", "sample", "group", "text"), _rows(answers))
    if any(each.layers for answer in answers for each in answer.found):
        print()
        print_table(("query", "rank", "layer", "part of the score"), _layers(answers))


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Return a text on one line, its end left out if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _rows(answers: Sequence[Answer]) -> Iterator[tuple[str, ...]]:
    for at, answer in enumerate(answers):
        for rank, each in enumerate(answer.found, 1):
            text = "-" if each.text is None else shortened(each.text)
            score = f"{each.score:.6g}"
            yield str(at), str(rank), score, each.sign, str(each.id), each.group or "-", text


def _layers(answers: Sequence[Answer]) -> Iterator[tuple[str, ...]]:
    for at, answer in enumerate(answers):
        for rank, each in enumerate(answer.found, 1):
            for layer, part in each.layers.items():
                yield str(at), str(rank), layer or "(the model)", f"{part:.6g}"
