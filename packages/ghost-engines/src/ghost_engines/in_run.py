"""In-run values: what each training sample did for the validation loss while training ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, MissingExtraError, UnknownNameError
from ghost_engines.discards import Discards
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine

if TYPE_CHECKING:
    import pandas


@dataclass
class _Pending:
    """A batch that no step was made with yet.

    Attributes:
        scores: Its scores.
        parameters: Names of the parameters whose gradients were not thrown away.
    """

    scores: Scores
    parameters: set[str]


@dataclass
class _Record:
    value: float = 0.0
    times_seen: int = 0
    first_step: int = 0
    last_step: int = 0


class InRunValues:
    """Adds up first-order In-Run Data Shapley values over a training run.

    A step of gradient descent with learning rate η credits each sample of its batches with

        φ_n = η ⟨contribution_n, g_val⟩

    (Wang et al., 2024, eq. 6). **Positive means that the sample lowered the validation loss.**
    Learning rates are read from the optimizer's parameter groups at each step. A batch whose step
    was skipped, or whose gradients were discarded, is credited with nothing. For optimizers other
    than plain gradient descent the values stand for the descent direction, not for the step.

    Gradient clipping is not known to it: a clipped step moves less than the values say. With a
    gradient scaler, give it to the engine, or every value is multiplied by the scale.

    What `zero_grad` throws away is known by parameter, wherever it is called before the first
    backward pass of a batch, and whoever holds the gradients: a step credits what it was made with.
    Between two backward passes of one batch, `zero_grad` must set gradients to None, its default,
    and is refused.

    Args:
        engine: The engine that scores the batches.
        optimizer: The optimizer that makes the steps, or a wrapper that has it in `.optimizer`, as
            Accelerate's. Steps that a scaler skips are not counted.
        direction: Name of the direction to use; the engine's only one by default.

    Raises:
        CaptureError: If the engine scores no batches, the optimizer does not hold a tracked
            parameter or does not tell of its steps, or a batch is open.
    """

    def __init__(
        self,
        engine: ScoringEngine[Any],
        optimizer: torch.optim.Optimizer,
        *,
        direction: str | None = None,
    ) -> None:
        self._engine = _scoring(engine)
        self._direction = direction
        if engine.is_open:
            raise CaptureError("make InRunValues outside of a batch, to see all of its gradients")
        optimizer = _stepping(optimizer)
        _rates(engine, optimizer)  # raises early
        self._records: dict[int, _Record] = {}
        self._pending: list[_Pending] = []
        self._discards = Discards(self._parameters)
        self._steps = 0
        self.skipped_batches = 0
        """Batches that no step was made with."""
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        engine.observe(self)

    def close(self) -> None:
        """Stop to watch the engine and the optimizer; the values stay."""
        for handle in self._handles:
            handle.remove()
        self._engine.unobserve(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Say how many samples there are, and of how many steps."""
        facts = [f"{len(self)} samples", f"{self._steps} steps"]
        if self.skipped_batches:
            facts.append(f"{self.skipped_batches} batches without one")
        return f"<{type(self).__name__}: {', '.join(facts)}>"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, sample: int) -> float:
        """Return the value of a sample.

        Raises:
            UnknownNameError: If no step was made with it.
        """
        if sample not in self._records:
            raise UnknownNameError("sample", str(sample), map(str, self._records))
        return self._records[sample].value

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return self._steps

    def to_dict(self) -> dict[int, float]:
        """Return the values by sample id."""
        return {sample: record.value for sample, record in self._records.items()}

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table: id, value, times_seen, first_step, last_step; lowest values first.

        Steps are numbered from 1.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "ghost-engines[pandas]", "to_pandas()") from error
        rows = [
            (sample, record.value, record.times_seen, record.first_step, record.last_step)
            for sample, record in self._records.items()
        ]
        columns = ["id", "value", "times_seen", "first_step", "last_step"]
        table = pandas.DataFrame(rows, columns=columns)
        return table.sort_values("value", ignore_index=True)

    # Called by the engine

    def starting(self) -> None:
        """Drop what was thrown away since the last batch.

        Gradient scalers skip steps that overflow; then `zero_grad` is called with no step before.
        """
        self._drop(self._discards.start())

    def arriving(self, name: str) -> None:
        """Look whether `zero_grad` was called inside the batch."""
        self._discards.arriving(name)

    def scored(self, scores: Scores) -> None:
        """Keep the scores of a batch until a step is made with it.

        Raises:
            CaptureError: If gradients were taken out of `.grad` inside the batch.
        """
        lost, made = self._discards.end()
        self._drop(lost)
        if made:
            self._pending.append(_Pending(scores, made))
        elif len(scores.ids):
            self.skipped_batches += 1  # under frozen() there is nothing to make a step with

    def _drop(self, lost: set[str]) -> None:
        """Credit nothing for the gradients of some parameters in the batches so far."""
        for each in self._pending:
            each.parameters -= lost
        kept = [each for each in self._pending if each.parameters]
        self.skipped_batches += len(self._pending) - len(kept)
        self._pending = kept

    # Called by the optimizer

    def _before_step(self, *_: Any) -> None:
        if self._engine.is_open:
            raise CaptureError(
                "the optimizer made a step inside an open batch: close it before optimizer.step(), "
                "so that its scores are known"
            )
        self._drop(self._discards.lost())

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A scaler leaves it to fused optimizers to skip a step, and tells them so.
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        self._steps += 1
        rates = _rates(self._engine, optimizer)
        for pending in self._pending:
            self._credit(pending, rates)
        self._pending.clear()
        self._discards.forget()

    def _credit(self, pending: _Pending, rates: Mapping[str, float]) -> None:
        scores = pending.scores
        column = self._column(scores)
        values = torch.zeros(len(scores.ids), dtype=torch.float64)
        for name, dots in scores.by_parameter.items():
            if name in pending.parameters:
                values += rates[name] * dots[:, column].to("cpu", torch.float64)
        for sample, value in zip(scores.ids.tolist(), values.tolist(), strict=True):
            record = self._records.setdefault(sample, _Record(first_step=self._steps))
            record.value += value
            record.times_seen += 1
            record.last_step = self._steps

    def _parameters(self) -> dict[str, nn.Parameter]:
        model = self._engine.model
        return {each.name: model.get_parameter(each.name) for each in self._engine.parameters}

    def _column(self, scores: Scores) -> int:
        if self._direction is None:
            if len(scores.directions) != 1:
                raise CaptureError(
                    f"the engine has {len(scores.directions)} directions: name one with "
                    f"InRunValues(..., direction=...), one of {', '.join(scores.directions)}"
                )
            return 0
        if self._direction not in scores.directions:
            raise UnknownNameError("direction", self._direction, scores.directions)
        return scores.directions.index(self._direction)


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


def _stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that makes the steps of one that may be a wrapper, as Accelerate's is.

    Raises:
        CaptureError: If there is none to follow.
    """
    inner: Any = optimizer
    # Only what was set up as an optimizer tells of its steps.
    while not (
        isinstance(inner, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(inner)
    ):
        if not hasattr(inner, "optimizer"):
            raise CaptureError(
                f"{type(optimizer).__name__} does not tell of its steps",
                reason="it is not set up as a torch.optim.Optimizer and has none in .optimizer",
                remedy="give InRunValues the optimizer inside that makes the steps",
            )
        inner = inner.optimizer
    return inner


def _rates(engine: ScoringEngine[Any], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of each tracked parameter, negative where a loss is maximised."""
    held = {leaf: group for group in optimizer.param_groups for leaf in group["params"]}
    rates = {}
    for parameter in engine.parameters:
        group = held.get(engine.model.get_parameter(parameter.name))
        if group is None:
            raise CaptureError(
                f"the optimizer does not hold {parameter.name}: leave it out with exclude=..., "
                "since no step changes it"
            )
        rates[parameter.name] = float(group["lr"]) * (-1 if group.get("maximize") else 1)
    return rates
