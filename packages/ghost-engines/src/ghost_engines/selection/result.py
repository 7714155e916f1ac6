"""What is known of candidates before the step, and which of them were chosen."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ghost_core import CaptureError, Policy, UnknownNameError
from ghost_core.arguments import text
from ghost_core.batch import SampleIds, as_ids
from ghost_core.plugins import installed
from ghost_engines.results import Result
from ghost_engines.scores import Scores


@dataclass(frozen=True, kw_only=True, repr=False)
class Chosen(Result):
    """Candidates that a policy chose, in the order of choice.

    Attributes:
        ids: Ids of the chosen, int64 `[k]` on the CPU.
        indices: Their positions among the candidates, int64 `[k]` on the CPU: `inputs[indices]` is
            what to train on.
        candidates: Number of candidates N.
        policy: What chose, as it says itself.
        direction: Name of the direction that it was for; None where nothing was scored, and then
            nothing is verified either.
    """

    indices: Tensor
    candidates: int
    policy: str
    direction: str | None

    def __len__(self) -> int:
        return len(self.indices)

    def _facts(self) -> list[str]:
        ids = reprlib.repr(self.ids.tolist())
        target = "" if self.direction is None else f" for {self.direction}"
        return [f"{len(self)} of {self.candidates}{target} by {self.policy}: {ids}"]


@dataclass(frozen=True, kw_only=True, repr=False)
class CandidateScores(Scores):
    """Dot products of candidates' own gradients with each direction, `[N, K]`, before any step.

    Attributes:
        products: What `gram` returns; None if it was not asked for.
    """

    products: Tensor | None = None

    @property
    def gram(self) -> Tensor:
        """Inner products `⟨g_n, g_m⟩` of the candidates' own gradients, `[N, N]`.

        Raises:
            CaptureError: If it was not asked for.
        """
        if self.products is None:
            raise CaptureError(
                "the inner products between candidates were not kept",
                reason="they cost the gradients of all candidates at once",
                remedy="ask for them: engine.score(losses, ids, gram=True)",
            )
        return self.products

    def choose(
        self, policy: Policy | str, *, direction: str | None = None, **options: Any
    ) -> Chosen:
        """Choose which candidates to train on.

        Args:
            policy: A policy, or the name that it is offered under: "top_k", "threshold", "greedy",
                or one of a plugin.
            direction: Name of the direction to choose for. It may be left out if there is one.
            options: With a name, the arguments of the policy.

        Returns:
            Those chosen, in the order of choice.

        Raises:
            UnknownNameError: If there is no such policy or direction.
            CaptureError: If scores are not finite, the policy needs inner products that were not
                asked for, options are given with no name, or what it returns is no choice.
        """
        made = as_policy(policy, options)
        column = self._column(direction)
        dots = self._finite("dot products", self.total[:, column])
        gram = self._finite("gradients", self.gram) if made.needs_gram or self._kept else None
        indices = _positions(made, made.choose(dots, gram), len(self.ids))
        return Chosen(
            ids=self.ids[indices],
            verified=self.verified,
            indices=indices,
            candidates=len(self.ids),
            policy=repr(made),
            direction=self.directions[column],
        )

    @property
    def _kept(self) -> bool:
        return self.products is not None

    def _column(self, direction: str | None) -> int:
        """Return the column of a direction."""
        if direction is None and len(self.directions) == 1:
            return 0
        if direction is None:
            raise CaptureError(
                f"there are {len(self.directions)} directions, and a choice is for one of them",
                remedy=f"say which: direction={self.directions[0]!r}",
            )
        if direction not in self.directions:
            raise UnknownNameError("direction", direction, self.directions)
        return self.directions.index(direction)

    def _finite(self, what: str, values: Tensor) -> Tensor:
        """Return values as policies get them."""
        values = values.detach().to("cpu", torch.float64)
        if values.isfinite().all():
            return values
        wrong = self.ids[~values.reshape(len(values), -1).isfinite().all(1)]
        raise CaptureError(
            f"the {what} of samples {reprlib.repr(wrong.tolist())} are not finite",
            reason="no order is right for them",
            remedy="leave such samples out, or compute in a wider dtype",
        )

    def _facts(self) -> list[str]:
        return [*super()._facts(), *(["with their Gram"] if self._kept else [])]


def choose_unscored(policy: Policy, ids: SampleIds) -> Chosen:
    """Choose by a policy that needs no dots: it is told of zeros.

    Args:
        policy: The policy.
        ids: One integer per candidate, `[N]`.

    Raises:
        CaptureError: If what it returns is no choice.
    """
    found = as_ids(ids)
    chosen = policy.choose(torch.zeros(len(found), dtype=torch.float64), None)
    indices = _positions(policy, chosen, len(found))
    return Chosen(
        ids=found[indices],
        verified=False,
        indices=indices,
        candidates=len(found),
        policy=repr(policy),
        direction=None,
    )


def as_policy(policy: Policy | str, options: Mapping[str, Any]) -> Policy:
    """Return a policy, made by name if it is one.

    Raises:
        UnknownNameError: If there is none of this name.
        CaptureError: If it cannot be made of the options, or is made already and some are given.
    """
    if isinstance(policy, Policy):
        if options:
            raise CaptureError(
                f"{', '.join(options)} cannot be given with {policy!r}, which is made already",
                remedy="give the policy alone, or its name and options",
            )
        return policy
    made = installed().policy(text("policy", policy))
    try:
        return made(**options)
    except TypeError as error:
        raise CaptureError(
            f"policy {policy!r} cannot be made of {dict(options)}",
            reason=str(error),
            remedy=f"it takes {', '.join(signature(made).parameters) or 'no options'}",
        ) from error


def _positions(policy: Policy, chosen: Any, n: int) -> Tensor:
    """Return what a policy chose as int64 `[k]`; refuse what is no choice among n."""
    positions = torch.as_tensor(chosen).detach().cpu()
    if positions.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    whole = not positions.is_floating_point() and positions.dtype != torch.bool
    if positions.dim() != 1 or not whole or len(positions.unique()) < len(positions):
        raise CaptureError(f"{policy!r} chose {positions.tolist()}, not positions, each once")
    if int(positions.min()) < 0 or int(positions.max()) >= n:
        raise CaptureError(f"{policy!r} chose {positions.tolist()} among {n} candidates")
    return positions.to(torch.int64)
