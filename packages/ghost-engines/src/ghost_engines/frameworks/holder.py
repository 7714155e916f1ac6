"""What the callbacks of all libraries have: a run, and what it credited since it was last asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ghost_core import CaptureError
from ghost_engines.runs import Run, RunConfig
from ghost_engines.values import CreditedStep, InRunValues


class RunHolder:
    """Holds a run, which is made when training begins: before, there is no optimizer.

    Args:
        config: What to do, as a `RunConfig` or a mapping of its fields.

    Attributes:
        config: The config.
        run: The run, once training began.

    Raises:
        CaptureError: If the config names a policy, which a trainer asks for no choice.
    """

    def __init__(self, config: RunConfig | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, RunConfig) else RunConfig.of(config)
        if self.config.policy is not None:
            raise CaptureError(
                f"policy={self.config.policy!r} chooses nothing inside a trainer",
                reason="it trains on all of each batch",
                remedy="leave the policy out, or choose in a loop of your own: run.select(...)",
            )
        self.run: Run | None = None
        self._inside = ExitStack()
        self._credited: dict[str, float] = {}

    @property
    def values(self) -> InRunValues:
        """The values so far; they stay when training ends.

        Raises:
            CaptureError: If training did not begin, or the run has none.
        """
        if self.run is None:
            raise CaptureError(
                "there are no values before training begins",
                remedy="call trainer.train(), or trainer.fit(), first",
            )
        return self.run.values

    def begin(self, run: Run, state: Mapping[str, Any] | None) -> None:
        """Enter a run, and go on from a state if there is one.

        Raises:
            CaptureError: If it cannot go on.
        """
        self.run = self._inside.enter_context(run)
        if state is not None:
            run.load_state_dict(state)
        if run.adds_up:
            run.values.on_credit(self._on_credit)

    def credited(self) -> dict[str, float]:
        """Return what was credited since the last call, to all samples, as `ghost_value_NAME`."""
        found, self._credited = self._credited, {}
        return {f"ghost_value_{name}": value for name, value in found.items()}

    def _on_credit(self, step: CreditedStep) -> None:
        for name, value in zip(step.directions, step.values.sum(0).tolist(), strict=True):
            self._credited[name] = self._credited.get(name, 0.0) + value
