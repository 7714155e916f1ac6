"""In-run values: what each training sample did for the validation loss while training ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ghost_core import CaptureError, MissingExtraError, UnknownNameError
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine

if TYPE_CHECKING:
    import pandas


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

    Call `zero_grad` before a batch is opened, as usual: gradients found zero then mean that the
    batches before were discarded. Called inside a batch, it must set gradients to None, its
    default.

    Args:
        engine: The engine that scores the batches.
        optimizer: The optimizer that makes the steps.
        direction: Name of the direction to use; the engine's only one by default.

    Raises:
        CaptureError: If the optimizer does not hold a tracked parameter.
    """

    def __init__(
        self,
        engine: ScoringEngine[Any],
        optimizer: torch.optim.Optimizer,
        *,
        direction: str | None = None,
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._direction = direction
        _rates(engine, optimizer)  # raises early
        self._records: dict[int, _Record] = {}
        self._pending: list[Scores] = []
        self._witness: tuple[torch.nn.Parameter, Tensor] | None = None
        self._steps = 0
        self.skipped_batches = 0
        """Batches that no step followed."""
        self._handle = optimizer.register_step_post_hook(self._credit)
        engine.observe(self)

    def close(self) -> None:
        """Stop to watch the engine and the optimizer; the values stay."""
        self._handle.remove()
        self._engine.unobserve(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
        """Drop batches whose gradients were discarded before a step was made with them.

        Gradient scalers skip steps that overflow; then `zero_grad` is called with no step before.
        """
        self._witness = None
        if self._pending:
            held = _gradients(self._optimizer)
            if any(bool(gradient.any()) for _, gradient in held):
                self._witness = held[0]
            else:
                self._drop()

    def scored(self, scores: Scores) -> None:
        """Keep the scores of a batch until a step is made with it."""
        witness, self._witness = self._witness, None
        if witness is not None and witness[0].grad is not witness[1]:
            self._drop()  # zero_grad was called inside the batch
        self._pending.append(scores)

    def _drop(self) -> None:
        self.skipped_batches += len(self._pending)
        self._pending.clear()

    def _credit(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._engine.is_open:
            raise CaptureError(
                "the optimizer made a step inside an open batch: close it before optimizer.step(), "
                "so that its scores are known"
            )
        self._steps += 1
        rates = _rates(self._engine, optimizer)
        for scores in self._pending:
            column = self._column(scores)
            values = torch.zeros(len(scores.ids), dtype=torch.float64)
            for name, dots in scores.by_parameter.items():
                values += rates[name] * dots[:, column].to("cpu", torch.float64)
            for sample, value in zip(scores.ids.tolist(), values.tolist(), strict=True):
                record = self._records.setdefault(sample, _Record(first_step=self._steps))
                record.value += value
                record.times_seen += 1
                record.last_step = self._steps
        self._pending.clear()

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


def _gradients(
    optimizer: torch.optim.Optimizer,
) -> list[tuple[torch.nn.Parameter, Tensor]]:
    return [
        (parameter, parameter.grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
