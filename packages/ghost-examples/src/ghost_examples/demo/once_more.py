"""Which passage, learned from once more, would help most? Ghost, the same words, and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
    "whitened": "Ghost: by gradient, whitened",
    "cosine": "Ghost: by gradient, cosine",
    "words": "The same words (TF-IDF)",
    "kind": "Random, of the same kind",
    "random": "Random",
}
"""How the passage is chosen, and what a reader is told of it."""


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
        more = np.subtract(self.gains["whitened"], self.gains["words"])
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
    near: dict[str, By] = {"whitened": Whitening.of(store), "cosine": "cosine"}
    words = TfidfVectorizer().fit([passage.text for passage in kept])
    texts, queries = (words.transform([p.text for p in those]) for those in (kept, asked))
    random = np.random.default_rng(0)
    alike = [[at for at, p in enumerate(kept) if p.domain == query.domain] for query in asked]
    return {
        **{way: store.search(rows, 1, by).ids[:, 0].tolist() for way, by in near.items()},
        "words": (queries @ texts.T).toarray().argmax(1).tolist(),
        "kind": [int(random.choice(those)) for those in alike],
        "random": random.integers(len(kept), size=len(asked)).tolist(),
    }


def judge(
    model: nn.Module,
    loss: PerSampleLoss,
    tokens: Tensor,
    queries: Tensor,
    chosen: Mapping[str, Sequence[int]],
) -> OnceMore:
    """Make one step on each passage that was chosen, and undo it.

    Args:
        model: The model.
        loss: Returns the loss of each passage, in nats per token.
        tokens: The stored passages, `[n, T]`.
        queries: The queries, `[Q, T]`.
        chosen: Which passage for each query, by way.
    """

    def patched(places: Sequence[int]) -> TailPatch:
        batches = [tokens[place : place + 1] for place in places]
        return tail_patch(model, loss, queries.split(1), batches, lr=LR)

    return OnceMore({way: (1000 * patched(places).gain).tolist() for way, places in chosen.items()})


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
