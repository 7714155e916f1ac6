"""What a recorder serves: whoever wants the gradients of a batch, above all engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ghost_core.algebra import PerSampleGradient, Record
from ghost_core.tracking import TrackedParameter, Tracking


@dataclass
class Pass:
    """One call of the root module: one batch of samples.

    Attributes:
        n: Number of samples in it.
        start: Position of its first sample in the engine's batch.
        owners: For modules whose rows are not samples: the sample of each row, by key.
        used: Names of the parameters that were used so far.
        several: Those of which several gradients may arrive in a backward pass: that were used more
            than once, or in values that are the same for all samples.
    """

    n: int
    start: int
    owners: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    several: set[str] = field(default_factory=set)

    @property
    def samples(self) -> slice:
        """Positions of its samples in the engine's batch."""
        return slice(self.start, self.start + self.n)

    def use(self, *names: str, shared: bool = False) -> None:
        """Note uses of parameters, by themselves or in a value that is the same for all samples."""
        for name in names:
            if shared or name in self.used:
                self.several.add(name)
            self.used.add(name)


class Listener(ABC):
    """Gets the records and gradients of what it tracks, in every batch that it opens.

    Attributes:
        tracking: What it tracks.
        verifies: Whether its batches are verified.
    """

    tracking: Tracking
    verifies: bool
    balanced: ClassVar[bool] = True
    """Whether contributions must add up to autograd's gradients, where these are made."""
    plain_sums: bool = False
    """Whether the gradients that it returns are the sums of all samples', as those that autograd
    makes are, so that these need no correction."""

    def on_call(self) -> None:
        """Look who calls the model in a batch of its own, right before that runs."""
        return

    def on_input(self, parameter: TrackedParameter, record: Record) -> Record:
        """Keep a record in the forward pass, or compress it if it is an `InputFactor`.

        Args:
            parameter: The parameter.
            record: What its sampler keeps of the call.

        Returns:
            What is kept instead. By default the record itself.
        """
        return record

    @abstractmethod
    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Use the per-sample gradients of one use of a parameter, during the backward pass.

        A parameter that is used several times arrives several times; its gradient is the sum.

        Args:
            pass_: The call of the model that it belongs to; `pass_.samples` are the
                positions of its samples in the batch.
            parameter: The parameter.
            gradient: The gradients of the pass's samples.

        Returns:
            None; with `Freeze.CALL`, the gradient that the parameter gets, of its shape.
        """
