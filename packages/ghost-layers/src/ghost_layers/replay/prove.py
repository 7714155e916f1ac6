"""Finds a way to run a recorded call again, sample by sample if possible, and proves it.

A way has to return what the call did, for all samples, and to give the first and the last sample
the gradients that the call as a whole gives them. Outputs do not show everything: behind a gate of
zero, or beside values that are hundreds of times larger, other random numbers go unseen, and a hook
or a branch inside may change gradients alone.

The call as a whole is proven by itself: it gives the same gradients twice, and NaN in one sample's
gradient reaches no other sample's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from ghost_core import WrongSplitError
from ghost_layers.replay.mixing import check_unmixed
from ghost_layers.replay.plan import Plan, Way
from ghost_layers.replay.recording import InputRows, OutputRows
from ghost_layers.replay.trial import Trial, failed

_AMBIGUOUS = 4
"""Input tensors up to which all choices of what samples share are tried."""
_REPEATABLE = "make it depend on its inputs, parameters and buffers alone"


@dataclass
class Search:
    """Compares ways to run a call with each other and with the call.

    Two samples with a mask that has two rows as well, `out = mask @ x * scale`:

        VMAP, x and mask by sample    mask[n] @ x[n] does not return what the call did
        VMAP, mask shared             mask @ x[n] does, and gives the same gradients: taken
        BATCH                         if neither did

    Attributes:
        trial: The call.
        axes: Axis of the rows in each output as the module returned it; None for a scalar.
    """

    trial: Trial
    axes: tuple[int | None, ...]
    _expected: dict[str, Tensor] = field(default_factory=dict, init=False)

    def find(self) -> Plan:
        """Return a plan that is proven.

        Raises:
            WrongSplitError: If there is none.
        """
        plan = self._as_it_was()
        for other in self._ways(plan) if plan.count > 1 else ():
            if self._holds(other) and self._gives_the_gradients_of(plan, other):
                if self._shares_gradients(plan, other):
                    check_unmixed(self.trial, plan, self._expected)
                return other
        if not self._gives_the_gradients_of(plan, plan):
            raise WrongSplitError(
                reason="it returns something else each time that it runs: it draws random numbers "
                "from a generator that is neither torch's, Python's or numpy's global one nor its "
                "own, or keeps a state",
                remedy=_REPEATABLE,
            )
        if plan.count > 1:
            check_unmixed(self.trial, plan, self._expected)
        return plan

    def untold(self, plan: Plan) -> frozenset[str]:
        """Return the parameters whose gradients were zero, and so told nothing of the plan.

        Behind two gates of zero neither has a gradient, until one of them has moved.
        """
        if plan.way is not Way.VMAP:
            return frozenset()
        return frozenset(key for key, each in self._expected.items() if not each.any())

    def _as_it_was(self) -> Plan:
        """Find the outputs among what the module returns, and assert that it returns them again."""
        plan, recorded = replace(self.trial.plan, way=Way.BATCH), self.trial.recorded
        returned = self.trial.returned(plan, differentiable=False)
        taken = list(range(len(returned)))
        if len(returned) != len(recorded):
            again = self.trial.returned(plan, differentiable=True)
            taken = [at for at, value in enumerate(again) if value.requires_grad]
        if len(taken) != len(recorded):
            raise WrongSplitError(
                reason=f"run again, it returned {len(returned)} tensors for {len(recorded)}"
            )
        autocast = plan.autocast[1] is not None
        plan = replace(
            plan,
            outputs=tuple(
                OutputRows(index, at, axis, recorded[index].dtype if autocast else None)
                for index, (at, axis) in enumerate(zip(taken, self.axes, strict=True))
                if axis is not None
            ),
        )
        outputs = [returned[each.at].movedim(each.axis, 0) for each in plan.outputs]
        if not self.trial.same_outputs(plan, outputs):
            raise WrongSplitError(
                reason="run again, it returned something else: it draws random numbers from a "
                "generator that is neither torch's, Python's or numpy's global one nor its own, "
                "keeps a state, or writes into what it is given",
                remedy=_REPEATABLE,
            )
        return plan

    def _ways(self, plan: Plan) -> Iterator[Plan]:
        if plan.rewritten is not None:
            yield replace(plan, way=Way.REWRITTEN)
        for rows in self._sharings(plan.input_rows):
            yield replace(plan, way=Way.VMAP, input_rows=rows)

    def _sharings(self, all_rows: tuple[InputRows, ...]) -> Iterator[tuple[InputRows, ...]]:
        """Yield the choices of what samples share, fewest first, that leave them something."""
        own = [at for at, rows in enumerate(all_rows) if rows.own]
        most = len(own) - 1 if len(own) <= _AMBIGUOUS else 1
        for size in range(most + 1) if own else ():
            for shared in combinations(own, size):
                yield tuple(
                    replace(rows, own=rows.own and at not in shared)
                    for at, rows in enumerate(all_rows)
                )

    def _holds(self, plan: Plan) -> bool:
        """Tell whether a way returns what the call did, as far as it can be run at all."""
        try:
            outputs = self.trial.run(plan)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # no batching rule, control flow by value, a batch of one, a refusal
            return False
        return self.trial.same_outputs(plan, outputs)

    def _shares_gradients(self, plan: Plan, other: Plan) -> bool:
        """Tell whether samples share rows that may be those of samples, and have a gradient."""
        rows = zip(plan.input_rows, other.input_rows, self.trial.replay.inputs, strict=True)
        return any(a.own and not b.own and value.requires_grad for a, b, value in rows)

    def _gives_the_gradients_of(self, plan: Plan, other: Plan) -> bool:
        """Tell whether another way, or the same one again, gives the gradients of a call."""
        if other.way is Way.REWRITTEN:  # by formulas that are known
            return True
        if not self._expected:
            try:
                self._expected = self.trial.gradients(plan)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise failed("differentiating", error) from error
        try:
            found = self.trial.gradients(other)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a backward pass that cannot be vectorised
            if other is plan:
                raise
            return False
        return self.trial.same_gradients(found, self._expected)
