"""Tells what became of gradients between the batches that made them and the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from torch import Tensor, nn

from ghost_core import CaptureError
from ghost_core._torch import backward_id
from ghost_core.ranks import ALONE, Ranks
from ghost_engines.values.prints import prints, prints_of_all, ratio, read


@dataclass(frozen=True)
class Change:
    """What was done to the gradients of parameters, by name, since they were looked at last.

    Attributes:
        lost: Whose were thrown away.
        factors: What others were multiplied with as a whole, by clipping or a scaler.
        other: Whose were changed in any other way.
    """

    lost: Set[str] = frozenset()
    factors: Mapping[str, float] = field(default_factory=dict)
    other: Set[str] = frozenset()


class Changes:
    """Compares gradients with those that the last batch left behind.

    Which tensor holds a gradient tells nothing: DDP and hooks put it into another. What is in it
    does: `zero_grad` leaves None or zeros where there was more, and clipping a multiple. No copy is
    kept, but a print of each. What a backward pass added to is gone for good, so gradients are
    looked at before it adds to them.

    Nothing here waits for a GPU while the batch runs.

    Args:
        ranks: The processes that train the model. Gradients of parameters in parts are looked at by
            all of them together. Others may change where this process's backward pass did not reach
            them.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._shared = ranks.several and ranks.sharded is None
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._left: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}
        self._passes: dict[str, int] = {}
        self._torn: set[str] = set()

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Change:
        """Begin a batch; return what was done since the last.

        Args:
            parameters: The parameters by name, as the optimizer holds them.
        """
        self._parameters = parameters
        self._found, self._passes, self._torn = {}, {}, set()
        return self.look()

    def look(self) -> Change:
        """Return what was done since gradients were looked at last."""
        if not self._left:
            return Change()
        now = self._now(self._left)
        change = self._compared(now)
        self._left = {name: each for name, each in now.items() if name not in change.lost}
        return change

    def arriving(self, name: str) -> None:
        """Look at a gradient that a backward pass is about to add to."""
        running = backward_id()
        before = self._passes.get(name)
        if before == running:
            return  # another use of the parameter: nothing was added yet
        self._passes[name] = running
        gradient = self._parameters[name].grad
        if before is not None:
            if gradient is None:
                self._torn.add(name)
        elif gradient is not None and name in self._left:
            self._found |= prints({name: gradient})

    def end(self) -> tuple[Change, set[str]]:
        """End a batch.

        Returns:
            What was done to the earlier gradients before the batch added to them, and the
            parameters that it has left a gradient for.

        Raises:
            CaptureError: If a gradient of the batch itself is not where it arrived.
        """
        training = {name: p for name, p in self._parameters.items() if p.requires_grad}
        now = self._now(training)
        self._check_kept(training.keys(), now)
        after = self._left if self._shared else now
        untouched = {n: after[n] for n in (now.keys() & after.keys()) - self._passes.keys()}
        change = self._compared(untouched | self._found) if self._left else Change()
        self._left = now
        return change, set(now)

    def forget(self) -> None:
        """Begin anew after a step: nothing that is left has to be looked at."""
        self._left = {}

    def _check_kept(self, training: Set[str], now: Mapping[str, Tensor]) -> None:
        if gone := training & (self._torn | (self._passes.keys() - now.keys())):
            raise CaptureError(
                f"gradients of {', '.join(sorted(gone))} were taken out of .grad inside the batch",
                reason="nobody can tell whether a step will be made with them",
                remedy="call zero_grad before the first backward pass of a batch, and close the "
                "batch before gradients are moved elsewhere",
            )

    def _now(self, names: Iterable[str]) -> dict[str, Tensor]:
        gradients = {name: self._parameters[name].grad for name in names}
        return prints({name: grad for name, grad in gradients.items() if grad is not None})

    def _compared(self, after: Mapping[str, Tensor]) -> Change:
        """Compare prints with those that were left; the one place that waits for a GPU.

        left   2, 4   1, 1   3, 0   5, 1
        now    gone   1, 1   6, 0   5, 7
               lost          × 2    changed in another way
        """
        before, now = read(*prints_of_all(self._ranks, self._left, after))
        filled = {name for name, each in before.items() if each.filled}
        lost = {
            name for name in before if name not in now or (name in filled and not now[name].filled)
        }
        if lost and lost >= filled:
            lost = set(before)  # zeros that were zeros before go with the others
        factors, other = {}, set()
        for name in before.keys() - lost:
            factor = ratio(before[name], now[name], self._parameters[name].dtype)
            if factor is None:
                other.add(name)
            elif factor != 1:
                factors[name] = factor
        return Change(lost, factors, other)
