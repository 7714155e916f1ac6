"""The interface of policies: which of a batch's candidates are trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor


class Policy(ABC):
    """Chooses among the candidates of a batch, by what a step on them would do to a target.

    A plugin offers one by name from the hook `ghost_policies`; options are arguments of its class.
    Its `repr` is how a choice says what made it.
    """

    needs_gram: ClassVar[bool] = False
    """Whether it looks at the inner products between candidates."""

    needs_dots: ClassVar[bool] = True
    """Whether it looks at dots; if not, a `Run` scores no candidates, and may have no method."""

    @abstractmethod
    def choose(self, dots: Tensor, gram: Tensor | None) -> Sequence[int] | Tensor:
        """Choose candidates.

        Args:
            dots: `⟨g_n, v⟩`, float64 `[N]` on the CPU: of each candidate's own gradient with the
                direction. All are finite. Where v is the gradient of a validation loss, a small
                step on a candidate with a positive dot lowers that loss. They may be zeros where
                they are not needed.
            gram: `⟨g_n, g_m⟩`, float64 `[N, N]` on the CPU; None if it was not asked for, which
                cannot be where `needs_gram` is set.

        Returns:
            Positions of those that are chosen, each once, in the order of choice.
        """
