"""Ways to choose which candidates of a step to train on, for the examples that compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_engines import Run, RunConfig


@dataclass(frozen=True)
class Way:
    """A way to choose.

    Attributes:
        policy: Name of the policy that a run chooses by; None for the candidates' own losses.
        scores: Whether that policy needs scores of the candidates.
        highest: Whether the highest losses are chosen, as one does for hard candidates.
    """

    policy: str | None = None
    scores: bool = False
    highest: bool = False

    def config(self, folder: Path, count: int) -> RunConfig:
        """Return the config of a run that chooses so many in each step, and adds up no values."""
        policy = None if self.policy is None else {self.policy: {"k": count}}
        method = "dot_product" if self.scores else "none"
        return RunConfig(folder=folder, method=method, policy=policy, values=False, log_every=10)

    def choose(
        self, run: Run, losses: Callable[[], Tensor], ids: Tensor, count: int, rate: float
    ) -> Tensor:
        """Return the positions of the candidates to train on.

        Args:
            run: A run with this way's config.
            losses: Returns the own loss of each candidate, `[N]`.
            ids: Their ids, `[N]`.
            count: How many to choose.
            rate: What a gradient is multiplied with in a step.
        """
        if self.policy is None:
            with run.evaluation(), torch.no_grad():
                return losses().argsort(descending=self.highest)[:count]
        changing: dict[str, Any] = {"lr": rate / count} if self.policy == "greedy" else {}
        return run.select(losses, ids, **changing).indices


WAYS: Mapping[str, Way] = {
    "at random": Way("random"),
    "highest loss": Way(highest=True),
    "lowest loss": Way(),
    "TopK": Way("top_k", scores=True),
    "Greedy": Way("greedy", scores=True),
}
"""Ways to choose, by name."""
