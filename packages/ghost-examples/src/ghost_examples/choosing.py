"""Ways to choose which candidates of a step to train on, for the examples that compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ghost_core import Policy
from ghost_engines import DotProductEngine, Greedy, TopK


@dataclass(frozen=True)
class Step:
    """What a way to choose is told.

    Attributes:
        engine: Has the loss of what the model should be good at as its direction; attached.
        losses: Returns the own loss of each candidate, `[N]`.
        ids: Their ids, `[N]`.
        count: How many to choose.
        rate: What a gradient is multiplied with in a step.
        chance: For those who choose at random.
    """

    engine: DotProductEngine
    losses: Callable[[], Tensor]
    ids: Tensor
    count: int
    rate: float
    chance: torch.Generator


Way = Callable[[Step], Tensor]
"""Returns the positions of the candidates to train on."""


def at_random(step: Step) -> Tensor:
    """Choose at random."""
    return torch.randperm(len(step.ids), generator=step.chance)[: step.count]


def by_loss(step: Step, *, highest: bool) -> Tensor:
    """Choose the candidates with the highest loss, as one does for hard ones, or the lowest."""
    with torch.no_grad():
        return step.losses().argsort(descending=highest)[: step.count]


def by_policy(step: Step, policy: Callable[[Step], Policy]) -> Tensor:
    """Choose by what a step on a candidate would do to the loss of the direction."""
    made = policy(step)
    with step.engine.scoring():
        scores = step.engine.score(step.losses, step.ids, gram=made.needs_gram)
    return scores.choose(made).indices


WAYS: Mapping[str, Way] = {
    "at random": at_random,
    "highest loss": partial(by_loss, highest=True),
    "lowest loss": partial(by_loss, highest=False),
    "TopK": partial(by_policy, policy=lambda step: TopK(step.count)),
    "Greedy": partial(by_policy, policy=lambda step: Greedy(step.count, step.rate / step.count)),
}
"""Ways to choose, by name."""
