"""Computes the user's losses, without ghost and in a batch of ghost's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ghost_core._torch import accumulation_hooks, gradient_hooks
from ghost_core.algebra import PerSampleGradient, Precision, Record, floating_dtypes
from ghost_core.capture import Freeze, Listener, Pass, Recorder
from ghost_core.compare.casts import CastMode
from ghost_core.compare.remainder import Remainder
from ghost_core.errors import CaptureError
from ghost_core.restoring import graphs_kept
from ghost_core.state import untouched
from ghost_core.tracking import Selection, TrackedParameter, track

Losses = Callable[[], Tensor]
"""Runs the model on a batch and returns one loss per sample, floating `[N]`; the same each time."""

Receive = Callable[[Pass, TrackedParameter, PerSampleGradient], None]
"""Takes the gradients of one use of a parameter."""


class Computation(Listener):
    """Runs losses on a model, whatever engines are attached to it, and leaves no trace.

    Args:
        model: The module that `losses` calls.
        losses: Computes one loss per sample.
        selection: What to track, and how.
        verify: Whether to verify the split by sample.
        owners: Tensors that `row_owner` names.

    Attributes:
        expected: The losses as they were at first, `[N]`.
        dtypes: Floating dtypes that were seen of casts, records and gradients, by parameter.
    """

    balanced = False
    expected: Tensor
    dtypes: dict[str, set[torch.dtype]]

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        selection: Selection,
        verify: bool,
        owners: Mapping[str, Tensor],
    ) -> None:
        self._recorder = Recorder.of(model)
        self.tracking = track(model, selection, self._recorder.flags)
        self.verifies = verify
        self._model, self._losses, self._owners = model, losses, owners
        self.parameters = {name: model.get_parameter(name) for name in sorted(self.tracking.names)}
        self._receive: Receive | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach without weight gradients, or as engines are that are attached for training.

        Raises:
            CaptureError: If hooks on parameters would change gradients, or run on those made here.
        """
        training = self._recorder.attached and not self._recorder.flags
        self._check_hooks(training)
        with self._recorder.serving(self, Freeze.NEVER if training else Freeze.PASS):
            casts = CastMode(self.parameters)
            with casts, self._without_ghost():
                self.expected = check_losses(self._losses()).detach()
            self.dtypes = casts.dtypes
            yield

    def differentiate(
        self, samples: Sequence[int], progress: Callable[[int], object] | None
    ) -> Remainder:
        """Ask autograd, without ghost, for the gradients of some samples; see `Remainder.of`."""
        with self._without_ghost():
            losses = check_losses(self._losses(), self.expected)
            return Remainder.of(losses, self.parameters, samples, progress)

    def backpropagate(self, weights: Tensor, receive: Receive) -> bool:
        """Backpropagate weighted losses in a batch, and return whether it is verified.

        Args:
            weights: Factor in each loss, `[N]`.
            receive: Takes the gradients that arrive.
        """
        self._receive = receive
        n = len(self.expected)
        with (
            untouched(self._model),
            graphs_kept(True),
            self._recorder.capture(self, n, self._owners) as batch,
        ):
            losses = check_losses(self._losses(), self.expected)
            (losses * weights.to(losses)).sum().backward()
        return self.verifies and not batch.doubt

    def on_input(self, parameter: TrackedParameter, record: Record) -> Record:
        """Note dtypes."""
        self.dtypes[parameter.name].update(floating_dtypes(record))
        return record

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Hand on what arrives."""
        assert self._receive is not None
        self.dtypes[parameter.name].update(floating_dtypes(gradient))
        self._receive(pass_, parameter, gradient)

    @contextmanager
    def _without_ghost(self) -> Iterator[None]:
        with self._recorder.paused(), untouched(self._model), graphs_kept(True):
            yield

    def _check_hooks(self, training: bool) -> None:
        for name, parameter in self._model.named_parameters():
            if training and accumulation_hooks(parameter):
                raise CaptureError(
                    f"{name} has a hook that runs when its gradient is there, and would run on "
                    "those of the comparison: compare before an engine is attached"
                )
        for name, parameter in self.parameters.items():
            if gradient_hooks(parameter):
                raise CaptureError(
                    f"{name} has a hook on its gradient, which contributions do not pass "
                    "through: remove the hook, or leave the parameter out with exclude=..."
                )


def check_losses(losses: object, expected: Tensor | None = None) -> Tensor:
    """Return losses after looking at them.

    Args:
        losses: What a function of the user's returned.
        expected: What it returned before.

    Raises:
        CaptureError: If it is not a differentiable floating tensor `[N]` of finite numbers, or not
            as before.
    """
    remedy = "return one loss per sample, a floating tensor [N] that depends on the parameters"
    if not isinstance(losses, Tensor):
        raise CaptureError(f"losses are a {type(losses).__name__}: {remedy}")
    if losses.dim() != 1 or not len(losses) or not losses.is_floating_point():
        kind = f"{str(losses.dtype).removeprefix('torch.')} of shape {tuple(losses.shape)}"
        raise CaptureError(f"losses are {kind}: {remedy}")
    if not losses.requires_grad:
        raise CaptureError(f"losses do not depend on any trainable parameter: {remedy}")
    if wrong := (~losses.isfinite()).nonzero().flatten().tolist():
        raise CaptureError(f"the loss of sample {wrong[0]} is not finite: {losses[wrong[0]]}")
    if expected is not None:
        allowed = Precision.of([losses.dtype]).tolerance
        if losses.shape != expected.shape or (
            (losses.detach() - expected).abs().max() > allowed * expected.abs().max()
        ):
            raise CaptureError(
                "losses are others each time they are computed: take one fixed batch, and no "
                "random numbers but those of torch, numpy and random"
            )
    return losses
