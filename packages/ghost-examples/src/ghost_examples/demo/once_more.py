"""Which passage, learned from once more, would help most? Ghost, the same words, and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from ghost_engines import GradientStore, PerSampleLoss
from ghost_engines.quality import TailPatch, tail_patch
from ghost_engines.search import Whitening
from ghost_engines.store import By
from ghost_examples.texts import Passage

LR = 0.05
"""Learning rate of the one step."""

WAYS = {
    "ghost, whitened": "Ghost: by gradient, whitened",
    "ghost, cosine": "Ghost: by gradient, cosine",
    "TF-IDF": "The same words (TF-IDF)",
    "random, same domain": "Random, of the same kind",
    "random": "Random",
}
"""How the passage is chosen, and what a reader of the report is told of it."""


@dataclass(frozen=True)
class OnceMore:
    """By how much a step on a passage lowers the loss of a query that was never learned from.

    Attributes:
        gains: By way of choosing the passage, in thousandths of a nat per token for each query.
    """

    gains: Mapping[str, Sequence[float]]

    @property
    def queries(self) -> int:
        """Number of queries."""
        return len(self.gains["random"])

    def mean(self, way: str) -> float:
        """Return the mean gain of a way."""
        return float(np.mean(self.gains[way]))

    def error(self, way: str) -> float:
        """Return the standard error of the mean gain of a way."""
        return _error(self.gains[way])

    @property
    def ahead(self) -> tuple[float, float]:
        """How much more whitened gradients gain than words, query by query, and its error."""
        more = np.subtract(self.gains["ghost, whitened"], self.gains["TF-IDF"])
        return float(more.mean()), _error(more)


def _error(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def choose(
    store: GradientStore, rows: Tensor, kept: Sequence[Passage], asked: Sequence[Passage]
) -> dict[str, list[int]]:
    """Choose a stored passage for each query in every way.

    Args:
        store: Their gradients, whose ids are places in `kept`.
        rows: Projected gradients of the queries, `[Q, k_total]`.
        kept: The passages that are stored.
        asked: The queries.

    Returns:
        Places in `kept` by way.
    """
    near: dict[str, By] = {"ghost, whitened": Whitening.of(store), "ghost, cosine": "cosine"}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(kept), (len(asked),), generator=generator).tolist()
    picks = torch.rand(len(asked), generator=generator).tolist()
    alike: dict[str, list[int]] = {}
    for place, passage in enumerate(kept):
        alike.setdefault(passage.domain, []).append(place)
    return {
        **{
            way: store.search(rows, 1, by, progress=False).ids[:, 0].tolist()
            for way, by in near.items()
        },
        "TF-IDF": _by_words(kept, asked),
        "random, same domain": [
            alike[query.domain][int(pick * len(alike[query.domain]))]
            for query, pick in zip(asked, picks, strict=True)
        ],
        "random": drawn,
    }


def _by_words(kept: Sequence[Passage], asked: Sequence[Passage]) -> list[int]:
    words = TfidfVectorizer(sublinear_tf=True)
    stored = words.fit_transform([passage.text for passage in kept])
    queries = words.transform([passage.text for passage in asked])
    found: list[int] = (queries @ stored.T).toarray().argmax(axis=1).tolist()
    return found


def step_on_each(
    model: nn.Module,
    loss: PerSampleLoss,
    tokens: Tensor,
    queries: Tensor,
    chosen: Mapping[str, Sequence[int]],
    lr: float = LR,
) -> dict[str, TailPatch]:
    """Make one step on each passage that was chosen, and undo it.

    Args:
        model: The model.
        loss: Returns the loss of each passage, in nats per token.
        tokens: The stored passages, `[n, T]`.
        queries: The queries, `[Q, T]`.
        chosen: Which passage for each query, by way.
        lr: Learning rate of the step.
    """
    return {
        way: tail_patch(
            model,
            loss,
            queries.split(1),
            [tokens[place : place + 1] for place in places],
            lr=lr,
            progress=False,
        )
        for way, places in chosen.items()
    }


def judge(
    model: nn.Module,
    loss: PerSampleLoss,
    tokens: Tensor,
    queries: Tensor,
    chosen: Mapping[str, Sequence[int]],
) -> OnceMore:
    """Return what `step_on_each` gains."""
    patched = step_on_each(model, loss, tokens, queries, chosen)
    return OnceMore({way: (1000 * each.gain).tolist() for way, each in patched.items()})


def show(found: OnceMore) -> None:
    """Print the gains."""
    print(
        f"One step on one passage lowers the loss of {found.queries} held-out passages by, in "
        "thousandths of a nat per token:"
    )
    for way, title in WAYS.items():
        print(f"  {title:<50} {found.mean(way):5.1f} ± {found.error(way):.1f}")
    more, error = found.ahead
    print(f"Query by query, whitened gradients gain {more:.1f} ± {error:.1f} more than words.")
