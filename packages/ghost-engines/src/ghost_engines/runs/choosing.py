"""Which candidates a run trains on: the policy that its config names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Self

from torch import Tensor

from ghost_core import CaptureError, Policy, SampleIds, UnknownNameError, UnknownOptionError
from ghost_core.arguments import text
from ghost_core.plugins import installed
from ghost_engines.runs.plain import plain
from ghost_engines.scoring import ScoringEngine
from ghost_engines.selection import Chosen, Losses, as_policy, choose_unscored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedPolicy:
    """A policy as a config names it.

    Attributes:
        name: The name that it is offered under.
        options: Arguments of its class; others may come with each choice.
    """

    name: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, given: object) -> Self:
        """Return the policy of a name, or of a mapping of one name to options.

        Raises:
            UnknownNameError: If there is no such policy.
            UnknownOptionError: If it has no such option.
            CaptureError: If it is neither, or options do not fit.
        """
        if isinstance(given, str):
            given = {given: {}}
        if not isinstance(given, Mapping) or len(given) != 1:
            raise CaptureError(
                f"policy must be a name, or a mapping of one name to its options, not {given!r}",
                remedy="give one, such as policy={'top_k': {'k': 8}}",
            )
        ((name, options),) = given.items()
        if not isinstance(options, Mapping):
            raise CaptureError(f"options of {name} must be a mapping by name, not {options!r}")
        found = cls(text("policy", name), options)
        found._check()
        return found

    @property
    def kind(self) -> type[Policy]:
        """Its class."""
        return installed().policy(self.name)

    @property
    def effective(self) -> dict[str, Any]:
        """Its options with their defaults; those that come with each choice are not there."""
        defaults = {name: each.default for name, each in signature(self.kind).parameters.items()}
        known = defaults | dict(self.options)
        return {name: value for name, value in known.items() if value is not Parameter.empty}

    def make(self, changed: Mapping[str, Any]) -> Policy:
        """Return it, with options of this choice alone.

        Raises:
            CaptureError: If it cannot be made of them.
        """
        return as_policy(self.name, {**self.options, **changed})

    def _check(self) -> None:
        """Refuse options that it does not take, and values that it refuses, before any choice."""
        takes = signature(self.kind)
        kinds = {each.kind for each in takes.parameters.values()}
        for name in self.options:
            if name not in takes.parameters and Parameter.VAR_KEYWORD not in kinds:
                raise UnknownOptionError(f"option of policy {self.name}", name, takes.parameters)
        plain(self.options, self.name)
        try:
            takes.bind(**self.options)
        except TypeError:
            return  # others come with each choice
        self.make({})


class Chooser:
    """Chooses candidates by the policy of a config.

    Args:
        policy: The policy, or None where a config names none.
        target: Name of the direction to choose for; it may be left out if there is one.
        scorer: The engine that scores candidates, if there is one.

    Raises:
        UnknownNameError: If there is no such direction.
        CaptureError: If there are several directions, and none of them is named.
    """

    def __init__(
        self, policy: NamedPolicy | None, target: str | None, scorer: ScoringEngine[Any] | None
    ) -> None:
        self._policy, self._target, self._scorer = policy, target, scorer
        self._asked = False
        if policy is None or scorer is None or not policy.kind.needs_dots:
            return
        if target is not None and target not in scorer.directions:
            raise UnknownNameError("target", target, scorer.directions)
        if target is None and len(scorer.directions) > 1:
            raise CaptureError(
                f"there are {len(scorer.directions)} directions, and a choice is for one of them",
                remedy=f"say which in the config: target={scorer.directions[0]!r}",
            )

    def say_if_unused(self) -> None:
        """Log that a config names a policy, and nobody asked for a choice."""
        if self._policy is not None and not self._asked:
            logger.warning(
                "policy %r chose nothing: call run.select(...) before each batch",
                self._policy.name,
            )

    def choose(
        self,
        losses: Losses,
        ids: SampleIds,
        owners: Mapping[str, Tensor],
        changed: Mapping[str, Any],
    ) -> Chosen:
        """Choose; see `Run.select`.

        Raises:
            CaptureError: If the config names no policy, or as `Run.select` does.
        """
        if self._policy is None:
            raise CaptureError(
                "the run has no policy to choose by",
                remedy="name one in its config, such as policy={'top_k': {'k': 8}}",
            )
        self._asked = True
        policy = self._policy.make(changed)
        if not policy.needs_dots:
            return choose_unscored(policy, ids)
        assert self._scorer is not None  # checked by the config
        with self._scorer.scoring():
            scores = self._scorer.score(losses, ids, gram=policy.needs_gram, owners=owners)
        return scores.choose(policy, direction=self._target)
