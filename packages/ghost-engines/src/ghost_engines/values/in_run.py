"""What a user sees of in-run values: a table that fills while training runs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from ghost_core import CaptureError
from ghost_core.arguments import whole
from ghost_core.restoring import Leave, undo
from ghost_engines.scoring import ScoringEngine
from ghost_engines.tables import Columns, Table
from ghost_engines.values.credit import CreditedStep, OnCredit
from ghost_engines.values.follower import Follower
from ghost_engines.values.groups import Groups, GroupValues, grouped
from ghost_engines.values.history import History, column_of
from ghost_engines.values.reasons import UnknownSampleError, why_empty, why_partly
from ghost_engines.values.sums import Sums
from ghost_engines.values.value_table import ValueTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_STATE = ("sums", "run", "history", "engine")
"""What a state has."""


class InRunValues(Table):
    """Adds up In-Run Data Shapley values over a training run.

    A step of gradient descent with learning rate η credits each sample of its batches with

        φ_n = η ⟨contribution_n, g_val⟩

    (Wang et al., 2024, eq. 6), for each of the engine's directions. **Positive means that the
    sample lowered the validation loss.** Learning rates are read from the optimizer's parameter
    groups at each step. A batch whose step was skipped, or whose gradients were discarded, is
    credited with nothing. For optimizers other than plain gradient descent the values stand for the
    descent direction, not for the step; `adam_aware` makes directions that do for Adam's.

    What happens to gradients between the batch and the step is noticed: a factor, of clipping or of
    a gradient scaler, is part of the value, whether the engine knows the scaler or not. Any other
    change, such as noise, is logged once and counted in the table, in the column `altered`.

    What `zero_grad` throws away is known by parameter, wherever it is called before the first
    backward pass of a batch, and whoever holds the gradients: a step credits what it was made with.
    Between two backward passes of one batch, `zero_grad` must set gradients to None, its default,
    and is refused.

    A table that is empty, or lacks batches when it is closed, says why, once, by `logging`.

    Args:
        engine: The engine that scores the batches.
        optimizer: The optimizer that makes the steps, or a wrapper that has it in `.optimizer`, as
            Accelerate's. Steps that a scaler skips are not counted.
        direction: Name of the only direction to use; all of the engine's by default.
        order: 2 adds what curvature does on the way of the step (Wang et al., 2024). It costs one
            Hessian-vector product for a direction and step, and copies of the gradients of a batch,
            in factors or built, are kept until its step. Directions must be closures that return
            a loss, without a transform.
        history: Whether to keep values over time, in `history`: True for the moments that `mark` is
            called at, a number for every so many steps too. Each takes the memory of all values.

    Raises:
        CaptureError: If the engine scores no batches, the optimizer does not hold a tracked
            parameter or does not tell of its steps, a batch is open, or `order` or `history` is
            none of these.
    """

    def __init__(
        self,
        engine: ScoringEngine[Any],
        optimizer: torch.optim.Optimizer,
        *,
        direction: str | None = None,
        order: Literal[1, 2] = 1,
        history: bool | int = False,
    ) -> None:
        if order not in (1, 2):
            raise CaptureError(f"order must be 1 or 2, not {order!r}")
        self._remembers = history is not False
        every = None if isinstance(history, bool) else whole("history", history, least=1)
        self._engine = engine
        self._sums: Sums | None = None
        self._history = History(lambda: self._known, every)
        self._said: set[str] = set()
        self._observers: OrderedDict[int, OnCredit] = OrderedDict()
        self._closing = ExitStack()
        undo(self._closing, lambda: self._follower.leave())
        self._closing.push(self._closed)
        self._follower = Follower(engine, optimizer, direction, self._credit, order)

    def close(self) -> None:
        """Stop to watch the engine and the optimizer; the values stay."""
        self._follower.close()
        self._explain(closing=True)

    def __enter__(self) -> Self:
        return self

    __exit__: Callable[..., None] = Leave(attrgetter("_closing.__exit__"))

    def _closed(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.close()
        else:  # an exception says why there is no more
            self._follower.close()

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
        column = column_of(self.directions, direction)
        if sample not in self._known:
            raise self._unknown(sample)
        return float(self._known.values[self._known.row(sample), column])

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far."""
        return self._follower.counts.steps

    @property
    def skipped_batches(self) -> int:
        """Number of batches that no step was made with."""
        return self._follower.counts.skipped

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the K directions."""
        return self._known.directions

    @property
    def history(self) -> History:
        """Values over time.

        Raises:
            CaptureError: If they were not asked for.
        """
        if not self._remembers:
            raise CaptureError(
                "values were not kept over time: make them with InRunValues(..., history=True) and "
                "call mark(), or with history=100 for every hundred steps"
            )
        return self._history

    def mark(self, label: str) -> None:
        """Keep the values as they are now in `history`, at the end of an epoch, say.

        Args:
            label: What to call the moment.

        Raises:
            CaptureError: If values over time were not asked for.
        """
        self.history.mark(self.steps, label)

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

    # What they are

    def table(self, *, normalised: bool = False) -> ValueTable:
        """Return the values as they are now, lowest of the first direction first.

        Args:
            normalised: Whether every step hands out as much: values are divided by the sum of the
                magnitudes of all in their step, whatever its learning rate and gradients.

        Raises:
            CaptureError: If values are to be normalised, and other processes have samples too.
        """
        if normalised and self._engine.ranks.several:
            raise CaptureError(
                "values cannot be normalised in one of several processes",
                reason="the magnitudes of a step are those of the samples of all of them",
                remedy="log steps with ScoreLog, and add up the logs of all processes",
            )
        self._explain()
        sums = self._known
        values = sums.shares if normalised else sums.values
        order = np.argsort(values[:, 0], kind="stable") if sums.directions else slice(0)
        return ValueTable(
            directions=sums.directions,
            ids=sums.ids[order],
            values=values[order],
            counts=sums.counts[order],
            steps=sums.steps,
            by_step=sums.shares_by_step if normalised else sums.by_step,
        )

    def gathered(self, group: Any = None) -> ValueTable:
        """Return the values of all processes that train the model, in each of them.

        All processes call it at the same place, also those that had no samples; one of them may
        write what it returns. Values of a sample that several processes had add up, and so does how
        often it was credited. In one process it is `table()`.

        Args:
            group: The processes; by default those that the engine's wrapper averages gradients of.

        Raises:
            CaptureError: If the processes have values of different directions.
        """
        table, group = self.table(), self._engine.ranks.group if group is None else group
        return table if group is None else table.gathered(group)

    def columns(self) -> Columns:
        """Return the columns: id, value, times_seen, first_step, last_step, altered; lowest first.

        `altered` counts steps whose gradients were changed in a way that the values do not know.
        With several directions, there is a column `value_NAME` for each, and rows are sorted by the
        first. Steps are numbered from 1.
        """
        return self.table().columns()

    def to_dict(self, direction: str | None = None) -> dict[int, float]:
        """Return the values by sample id.

        Args:
            direction: Name of the direction; needed if there are several.

        Raises:
            UnknownNameError: If there is no such direction.
            CaptureError: If there are several directions, and none is named.
        """
        self._explain()
        values = self._known.values[:, column_of(self.directions, direction)]
        return dict(zip(self._known.ids.tolist(), values.tolist(), strict=True))

    def by_group(self, groups: Groups) -> GroupValues:
        """Add up the values of groups of samples, as of training domains.

        Args:
            groups: The name of each sample's group: by id, or a function of the id.

        Returns:
            A table with a row for each group, and a column for each direction.

        Raises:
            UnknownNameError: If a sample has no group.
        """
        self._explain()
        return grouped(self._known.ids, self._known.values, self.directions, groups)

    def plot(self, path: str | Path | None = None, *, top: int = 10) -> Figure:
        """Draw the most helpful and most harmful samples, the distribution, and sums over time.

        Args:
            path: Where to write the picture, if anywhere: .png, .svg, .pdf.
            top: How many samples to name of each.

        Returns:
            A figure with a row for each direction.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            OSError: If the file cannot be written.
        """
        return self.table().plot(path, top=top)

    # Going on in another process

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, to save with the model's checkpoint.

        Save it where a step was made: gradients are not part of it, and batches that wait for a
        step are counted as skipped by the process that goes on.
        """
        return {
            "sums": self._known.state_dict(),
            "run": self._follower.state_dict(),
            "history": self.history.state_dict() if self._remembers else None,
            "engine": self._engine.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the process did whose state it is: values are bit for bit those of one run.

        Raises:
            CaptureError: If it is no whole state, it was of other directions, or a batch is open.
        """
        if missing := [name for name in _STATE if name not in state]:
            raise CaptureError(
                f"this is no state of {type(self).__name__}: it lacks {', '.join(missing)}",
                remedy="give what state_dict() returned, as a whole",
            )
        if self._engine.is_open:
            raise CaptureError("load the state of values outside of a batch")
        sums = Sums.of_state(state["sums"])
        if sums.directions != self._follower.directions:
            raise CaptureError(
                f"the state is of directions {', '.join(sums.directions)}, and these values are of "
                f"{', '.join(self._follower.directions)}: add the same, in the same order, first"
            )
        self._engine.load_state_dict(state["engine"])
        self._follower.load_state_dict(state["run"])
        self._sums = sums
        if self._remembers and state["history"] is not None:
            self.history.load_state_dict(state["history"])
        if waiting := len(state["run"]["waiting"]):
            logger.warning(
                "the state was saved while %d batches waited for a step; their gradients are gone, "
                "and they are counted as skipped",
                waiting,
            )

    @property
    def _known(self) -> Sums:
        """The sums, whose columns are known once the first batch was scored."""
        return Sums(self._follower.directions) if self._sums is None else self._sums

    def _credit(self, credited: CreditedStep) -> None:
        for observer in list(self._observers.values()):
            observer(credited)
        if len(credited.ids):
            self._sums = Sums(credited.directions) if self._sums is None else self._sums
            self._sums.add(credited)
        if self._remembers:
            self.history.stepped(credited.step)

    def _explain(self, *, closing: bool = False) -> None:
        """Say once why values are missing, if they are."""
        counts, waiting = self._follower.counts, len(self._follower.waiting)
        if not len(self):
            what, reason = "there are no values", why_empty(counts, scaled=self._engine.is_scaled)
        else:
            what, reason = "values are missing", why_partly(counts, waiting) if closing else ""
        if reason and what not in self._said:
            self._said.add(what)
            logger.warning("%s: %s", what, reason)

    def _unknown(self, sample: object) -> UnknownSampleError:
        if sample not in self.directions:
            return UnknownSampleError(sample, self._why_unknown(sample))
        remedy = f"values[sample, {sample!r}], or values.to_dict({sample!r}) for all samples"
        return UnknownSampleError(sample, f"{sample!r} is the name of a direction", remedy)

    def _why_unknown(self, sample: object) -> str:
        follower = self._follower
        if not follower.counts.batches:
            return why_empty(follower.counts, scaled=self._engine.is_scaled)
        if any(sample in ids.tolist() for ids in follower.waiting):
            return "no step was made with its batch yet"
        if sample in follower.skipped_ids:
            return "the gradients of its batch were thrown away before a step was made with them"
        return f"it was in none of the {follower.counts.batches} batches so far"
