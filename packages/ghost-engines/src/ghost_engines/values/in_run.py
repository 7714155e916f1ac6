"""What a user sees of in-run values: a table that fills while training runs."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch.utils.hooks import RemovableHandle

from ghost_core import CaptureError, MissingExtraError, UnknownNameError
from ghost_engines.scoring import ScoringEngine
from ghost_engines.values.credit import CreditedStep, OnCredit
from ghost_engines.values.follower import Follower
from ghost_engines.values.table import COUNTS, Table

if TYPE_CHECKING:
    import pandas


class InRunValues:
    """Adds up In-Run Data Shapley values over a training run.

    A step of gradient descent with learning rate η credits each sample of its batches with

        φ_n = η ⟨contribution_n, g_val⟩

    (Wang et al., 2024, eq. 6), for each of the engine's directions. **Positive means that the
    sample lowered the validation loss.** Learning rates are read from the optimizer's parameter
    groups at each step. A batch whose step was skipped, or whose gradients were discarded, is
    credited with nothing. For optimizers other than plain gradient descent the values stand for the
    descent direction, not for the step.

    What happens to gradients between the batch and the step is noticed: a factor, of clipping or of
    a gradient scaler, is part of the value, whether the engine knows the scaler or not. Any other
    change, such as noise, is logged once and counted in the table, in the column `altered`.

    What `zero_grad` throws away is known by parameter, wherever it is called before the first
    backward pass of a batch, and whoever holds the gradients: a step credits what it was made with.
    Between two backward passes of one batch, `zero_grad` must set gradients to None, its default,
    and is refused.

    Args:
        engine: The engine that scores the batches.
        optimizer: The optimizer that makes the steps, or a wrapper that has it in `.optimizer`, as
            Accelerate's. Steps that a scaler skips are not counted.
        direction: Name of the only direction to use; all of the engine's by default.
        order: 2 adds what curvature does on the way of the step (Wang et al., 2024). It costs one
            Hessian-vector product for a direction and step, and copies of the gradients of a batch,
            in factors or built, are kept until its step. Directions must be closures that return
            a loss, without a transform.

    Raises:
        CaptureError: If the engine scores no batches, the optimizer does not hold a tracked
            parameter or does not tell of its steps, a batch is open, or `order` is another.
    """

    def __init__(
        self,
        engine: ScoringEngine[Any],
        optimizer: torch.optim.Optimizer,
        *,
        direction: str | None = None,
        order: Literal[1, 2] = 1,
    ) -> None:
        if order not in (1, 2):
            raise CaptureError(f"order must be 1 or 2, not {order!r}")
        self._table: Table | None = None
        self._observers: OrderedDict[int, OnCredit] = OrderedDict()
        self._follower = Follower(engine, optimizer, direction, self._credit, order)

    def close(self) -> None:
        """Stop to watch the engine and the optimizer; the values stay."""
        self._follower.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Say how many samples there are, and of how many steps."""
        facts = [f"{len(self)} samples", f"{self.steps} steps"]
        if self.skipped_batches:
            facts.append(f"{self.skipped_batches} batches without one")
        return f"<{type(self).__name__}: {', '.join(facts)}>"

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, key: int | tuple[int, str]) -> float:
        """Return the value of a sample: `values[sample]`, or `values[sample, direction]`.

        Raises:
            UnknownNameError: If no step was made with it, or there is no such direction.
            CaptureError: If there are several directions, and none is named.
        """
        sample, direction = key if isinstance(key, tuple) else (key, None)
        column = self._column(direction)
        if sample not in self._known:
            raise UnknownNameError("sample", str(sample), map(str, self._known.ids.tolist()))
        return float(self._known.values[self._known.row(sample), column])

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return self._follower.steps

    @property
    def skipped_batches(self) -> int:
        """Number of batches that no step was made with."""
        return self._follower.skipped_batches

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the K directions."""
        return self._known.directions

    def on_credit(self, callback: OnCredit) -> RemovableHandle:
        """Have a function called with each step that was made, before it is added to the values.

        It is called inside `optimizer.step()`, also for steps that credit nobody.

        Args:
            callback: Takes a `CreditedStep`.

        Returns:
            A handle whose `remove()` ends that.
        """
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = callback
        return handle

    def to_dict(self, direction: str | None = None) -> dict[int, float]:
        """Return the values by sample id.

        Args:
            direction: Name of the direction; needed if there are several.

        Raises:
            UnknownNameError: If there is no such direction.
            CaptureError: If there are several directions, and none is named.
        """
        values = self._known.values[:, self._column(direction)]
        return dict(zip(self._known.ids.tolist(), values.tolist(), strict=True))

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table: id, value, times_seen, first_step, last_step, altered; lowest first.

        `altered` counts steps whose gradients were changed in a way that the values do not know.
        With several directions, there is a column `value_NAME` for each, and rows are sorted by the
        first. Steps are numbered from 1.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "ghost-engines[pandas]", "to_pandas()") from error
        names = self.directions
        columns = ["value"] if len(names) == 1 else [f"value_{name}" for name in names]
        table = pandas.DataFrame(self._known.values, columns=columns)
        table.insert(0, "id", self._known.ids)
        table[list(COUNTS)] = self._known.counts
        return table.sort_values(columns[0], ignore_index=True)

    @property
    def _known(self) -> Table:
        """The table, which has columns once the first batch was scored."""
        if self._table is None:
            return Table(self._follower.directions)
        return self._table

    def _credit(self, credited: CreditedStep) -> None:
        for observer in list(self._observers.values()):
            observer(credited)
        if self._table is None and len(credited.ids):
            self._table = Table(credited.directions)
        if self._table is not None:
            self._table.add(credited)

    def _column(self, direction: str | None) -> int:
        names = self.directions
        if direction is None and len(names) != 1:
            raise CaptureError(f"there are {len(names)} directions: name one of {', '.join(names)}")
        if direction is not None and direction not in names:
            raise UnknownNameError("direction", direction, names)
        return 0 if direction is None else names.index(direction)
