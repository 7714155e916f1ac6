"""Follows the batches of an engine and the steps of an optimizer, and tells what steps credit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghost_core import CaptureError, Pass, PerSampleGradient, TrackedParameter, UnknownNameError
from ghost_core._torch import version
from ghost_engines.held import HeldGradients
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine
from ghost_engines.values.changes import Change, Changes
from ghost_engines.values.credit import CreditedStep, OnCredit
from ghost_engines.values.optimizers import rates, scale_left, skipped, stepping
from ghost_engines.values.pending import Pending
from ghost_engines.values.reasons import Counts
from ghost_engines.values.second_order import add_curvature

logger = logging.getLogger(__name__)

_ALTERED = (
    "gradients of %s were changed between the batch that made them and the step, and not by a "
    "factor: by noise, clipping element by element, or a backward pass outside of a batch. Values "
    "are those of the gradients as they were backpropagated; samples of such steps are counted in "
    "the column altered"
)

_NO_IDS = torch.zeros(0, dtype=torch.int64)


class Follower:
    """Credits each step to the batches whose gradients it is made with.

    Args:
        engine: The engine that scores the batches.
        optimizer: The optimizer that makes the steps, or a wrapper of it.
        direction: Name of the only direction to use; all by default.
        on_credit: Is told of each step.
        order: Whether curvature is part of values: 1 or 2.

    Attributes:
        counts: What was seen so far.
        skipped_ids: Ids of samples whose batch was skipped.

    Raises:
        CaptureError: If the engine scores no batches, the optimizer does not hold a tracked
            parameter or does not tell of its steps, or a batch is open.
    """

    def __init__(
        self,
        engine: ScoringEngine[Any],
        optimizer: torch.optim.Optimizer,
        direction: str | None,
        on_credit: OnCredit,
        order: int,
    ) -> None:
        self._engine = _scoring(engine)
        if engine.is_open:
            raise CaptureError("make InRunValues outside of a batch, to see all of its gradients")
        optimizer = stepping(optimizer)
        self._leaves = self._parameters()
        rates(self._leaves, optimizer)  # raises early
        self._direction = direction
        self._on_credit = on_credit
        self._order = order
        self._held: HeldGradients | None = None
        self._pending: list[Pending] = []
        self._changes = Changes(engine.ranks)
        self._directions: tuple[str, ...] = () if direction is None else (direction,)
        self.counts = Counts()
        self.skipped_ids: set[int] = set()
        self._versions: dict[str, int] = {}
        self._said_altered = False
        self._has_closure = False
        self._handles: list[RemovableHandle] = []
        try:
            engine.observe(self)
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        except BaseException:
            self.leave()
            raise

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the directions: those of the first batch, and before it those of the engine."""
        return self._directions or self._engine.directions

    @property
    def waiting(self) -> list[Tensor]:
        """Ids of the samples of each batch that no step was made with yet, `[N]`."""
        return [each.scores.ids for each in self._pending]

    def state_dict(self) -> dict[str, Any]:
        """Return what another process needs to go on."""
        return {
            "counts": asdict(self.counts),
            "skipped_ids": torch.tensor(sorted(self.skipped_ids), dtype=torch.int64),
            "waiting": [ids.clone() for ids in self.waiting],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the process did whose state it is.

        Gradients are not part of the state, and batches that waited for a step lost theirs.
        """
        self.counts = Counts(**state["counts"])
        self.skipped_ids = set(state["skipped_ids"].tolist())
        for ids in state["waiting"]:
            self.counts.skipped += 1
            self.skipped_ids.update(ids.tolist())
        self._pending = []
        self._changes.forget()

    def close(self) -> None:
        """Stop to watch the engine and the optimizer."""
        self._look_for_other_steps()
        self.leave()

    def leave(self) -> None:
        """Be told of nothing any more; it may be repeated after an interrupt."""
        for handle in self._handles:
            handle.remove()
        self._engine.unobserve(self)

    # Called by the engine

    def starting(self) -> None:
        """Look what was done to gradients since the last batch.

        Gradient scalers skip steps that overflow; then `zero_grad` is called with no step before.
        """
        self._leaves = self._parameters()
        self._look_for_other_steps()
        self._apply(self._changes.start(self._leaves))
        self._held = HeldGradients(self._engine.parameters) if self._order == 2 else None

    def arriving(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Look what was done to earlier gradients inside the batch."""
        self._changes.arriving(parameter.name)
        if self._held is not None:
            self._held.add(pass_, parameter, gradient)

    def scored(self, scores: Scores) -> None:
        """Keep the scores of a batch until a step is made with it.

        Raises:
            CaptureError: If gradients were taken out of `.grad` inside the batch, or the engine has
                other directions than before.
            UnknownNameError: If the engine does not have the direction.
        """
        self._check_directions(scores)
        change, made = self._changes.end()
        self._apply(change)
        self.counts.batches += 1
        self._look_for_other_steps()
        held, self._held = self._held, None
        if made:
            # What the engine divided out is in the gradients until the scaler takes it out.
            scale = self._engine.loss_scale
            kept = None if held is None else held.copy()  # until the step, and not only the batch
            self._pending.append(Pending(scores, dict.fromkeys(made, scale), scale, kept))
        elif len(scores.ids):
            self._skip(scores)  # under frozen() there is nothing to make a step with

    def _apply(self, change: Change) -> None:
        """Do to the batches so far what was done to their gradients."""
        for each in self._pending:
            each.apply(change)
        for each in self._pending:
            if not each.factors:
                self._skip(each.scores)
        self._pending = kept = [each for each in self._pending if each.factors]
        if any(each.altered for each in kept) and not self._said_altered:
            self._said_altered = True
            logger.warning(_ALTERED, ", ".join(sorted(change.other)))

    def _skip(self, scores: Scores) -> None:
        self.counts.skipped += 1
        self.skipped_ids.update(scores.ids.tolist())

    def _look_for_other_steps(self) -> None:
        """Notice whether parameters changed while gradients wait for a step."""
        now = {name: version(leaf) for name, leaf in self._leaves.items()}
        if self._pending and now != self._versions:
            self.counts.foreign += 1
        self._versions = now

    def _check_directions(self, scores: Scores) -> None:
        if self._direction is not None:
            if self._direction not in scores.directions:
                raise UnknownNameError("direction", self._direction, scores.directions)
        elif self._directions not in ((), scores.directions):
            raise CaptureError(
                f"the engine's directions are {', '.join(scores.directions)} now, and were "
                f"{', '.join(self._directions)} when values were first credited",
                reason="a value is a sum over steps, and would lack some",
                remedy="give InRunValues the one direction that stays with direction=..., or make "
                "another InRunValues for the new ones",
            )
        else:
            self._directions = scores.directions

    # Called by the optimizer

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # A closure makes the gradients after this, and may close its batch itself.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._has_closure = closure is not None
        if self._has_closure:
            self._check_order()
        else:
            self._check_closed()
        self._apply(self._changes.look())
        if self._order == 2 and not skipped(optimizer):
            add_curvature(self._engine, self._pending, self._moved(optimizer), self.directions)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._has_closure:
            self._check_closed()
            self._apply(self._changes.look())  # steps leave gradients as they are
        if skipped(optimizer):
            return
        self.counts.steps += 1
        pending, self._pending = self._pending, []
        self._changes.forget()
        moved = self._moved(optimizer)
        credit = [each.credit(moved, self.directions) for each in pending]
        nothing = torch.zeros(0, len(self.directions), dtype=torch.float64)
        self._on_credit(
            CreditedStep(
                step=self.counts.steps,
                ids=torch.cat([_NO_IDS, *(each.scores.ids for each in pending)]),
                values=torch.cat([nothing, *credit]),
                directions=self.directions,
                altered=any(each.altered for each in pending),
            )
        )

    def _check_closed(self) -> None:
        if self._engine.is_open:
            raise CaptureError(
                "the optimizer made a step inside an open batch: close it before optimizer.step(), "
                "so that its scores are known"
            )

    def _check_order(self) -> None:
        if self._order == 2:
            raise CaptureError(
                "optimizer.step(closure) does not go with order=2",
                reason="curvature is taken along the step, between the gradients and it",
                remedy="call loss.backward() before optimizer.step(), or take order=1",
            )

    def _moved(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Return what a step multiplies the gradients of parameters with, by name."""
        scale = scale_left(optimizer)
        return {name: rate / scale for name, rate in rates(self._leaves, optimizer).items()}

    def _parameters(self) -> dict[str, nn.Parameter]:
        model = self._engine.ranks.settled(self._engine.model)
        leaves = dict(model.named_parameters())
        return {each.name: leaves[each.name] for each in self._engine.parameters}


def _scoring(engine: object) -> ScoringEngine[Any]:
    """Return an engine that scores batches.

    Raises:
        CaptureError: If it does not.
    """
    if isinstance(engine, ScoringEngine):
        return engine
    is_class = isinstance(engine, type)
    kind = engine.__name__ if isinstance(engine, type) else type(engine).__name__
    raise CaptureError(
        f"{kind} is a class, not an engine" if is_class else f"{kind} scores no batches",
        reason="values are sums of the scores of batches",
        remedy="give InRunValues the engine first, such as a DotProductEngine(model), then the "
        "optimizer",
    )
