"""Engines that multiply the gradients of a batch with directions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol, TypeVar, Unpack

import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    CaptureError,
    Engine,
    EngineOptions,
    Pass,
    PerSampleGradient,
    TrackedParameter,
    UnknownNameError,
)
from ghost_core.algebra import accumulation_dtype
from ghost_core.arguments import whole
from ghost_engines.directions import Closure, Direction, check_closure, given
from ghost_engines.scores import Scores
from ghost_engines.tokens import TokenSum

ScoresT = TypeVar("ScoresT", bound=Scores)


class ScoreObserver(Protocol):
    """Follows the batches of a `ScoringEngine`."""

    def starting(self) -> None:
        """A batch is about to be captured."""
        ...

    def arriving(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """A gradient arrived that autograd did not add to the parameter's `.grad` yet.

        It runs during the backward pass, once for each use of the parameter, with what
        `Engine.on_gradient` is told.
        """
        ...

    def scored(self, scores: Scores) -> None:
        """A batch was scored."""
        ...


class ScoringEngine(Engine[ScoresT]):
    """Multiplies the per-sample gradients of a batch with directions.

    A subclass writes `make_scores`.

    Args:
        model: The module that the training loop calls.
        per_token: Whether to keep dots by token too, `Scores.by_token` `[N, T, K]`. All tracked
            parameters must have the same T tokens in all passes of a batch, or closing it raises
            a `CaptureError`. Each direction then costs one contraction over all tokens.
        options: What all engines take: see `Engine`. With `grad_scaler`, a batch whose gradients
            overflow has scores that are not finite.

    Raises:
        UnknownNameError: If a glob matches nothing.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
        CaptureError: If no trainable parameter is selected, a module is compiled, or `row_owner` is
            given for one whose gradients are to be kept by token.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per_token: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(model, **options)
        if per_token:
            self._check_positions()
        self._per_token = per_token
        self._directions: dict[str, Direction] = {}
        self._stacked: dict[str, Tensor] = {}
        self._dots: dict[str, Tensor] = {}
        self._tokens: TokenSum | None = None
        self._observers: list[ScoreObserver] = []

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the directions, in the order of their columns."""
        return tuple(self._directions)

    def add_direction(
        self, name: str, direction: Closure | Mapping[str, Tensor], *, refresh: int | None = None
    ) -> None:
        """Add a direction, or replace the one of this name.

        Args:
            name: Its name.
            direction: A closure that returns the scalar loss whose gradient is the direction, or a
                tensor for each tracked parameter by name. The closure runs in evaluation mode and
                leaves no trace; a single direction can be linear in many validation samples.
            refresh: For a closure: batches after which it is called again; by default 1, so that
                the direction always belongs to the current parameters.

        Raises:
            UnknownNameError: If a name is no parameter of the model.
            CaptureError: If a tracked parameter is missing, a shape or value is wrong, the closure
                takes arguments, or `refresh` is given with tensors or is not positive.
        """
        if isinstance(direction, Mapping):
            if refresh is not None:
                raise CaptureError("refresh goes with a closure; tensors stay as they are")
            tensors = given(name, direction, self.model, self.parameters)
            self._directions[name] = Direction(name, None, 1, tensors)
        elif callable(direction):
            batches = 1 if refresh is None else whole("refresh", refresh, least=1)
            check_closure(name, direction)
            self._directions[name] = Direction(name, direction, batches, {})
        else:
            raise CaptureError(
                f"direction {name!r} must be a closure or a mapping of tensors, not "
                f"{type(direction).__name__}"
            )
        self._stacked.clear()

    def remove_direction(self, name: str) -> None:
        """Remove a direction.

        Raises:
            UnknownNameError: If there is none of this name.
        """
        if name not in self._directions:
            raise UnknownNameError("direction", name, self._directions)
        del self._directions[name]
        self._stacked.clear()

    def observe(self, observer: ScoreObserver) -> None:
        """Tell an observer of every batch from now on."""
        self._observers.append(observer)

    def unobserve(self, observer: ScoreObserver) -> None:
        """Stop to tell an observer, if it is told."""
        if observer in self._observers:
            self._observers.remove(observer)

    def on_start(self, batch: Batch[ScoresT]) -> None:
        """Renew the directions that are due."""
        for observer in self._observers:
            observer.starting()
        if not self._directions:
            raise CaptureError("there is nothing to score against: call add_direction first")
        with self.paused():
            # All of them are asked: each counts its batches.
            changed = [
                each.renew(self.model, self.parameters) for each in self._directions.values()
            ]
        if any(changed) or not self._stacked:
            self._stacked = {
                parameter.name: torch.stack(
                    [each.tensors[parameter.name] for each in self._directions.values()]
                )
                for parameter in self.parameters
            }
        self._dots = {
            name: stacked.new_zeros(batch.n, len(self._directions))
            for name, stacked in self._stacked.items()
        }
        if self._per_token:
            dtype = accumulation_dtype(*self._dots.values())
            shape, device = (batch.n, 0, len(self._directions)), self.parameters[0].device
            self._tokens = TokenSum(torch.zeros(shape, dtype=dtype, device=device))

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Multiply with the directions, and tell the observers."""
        for observer in self._observers:
            observer.arriving(pass_, parameter, gradient)
        stacked = self._stacked[parameter.name]
        if self._tokens is None:
            dots = gradient.dot(stacked)
        else:
            by_token = gradient.token_dot(stacked)
            self._tokens.add(pass_, parameter.name, by_token)
            dots = by_token.sum(1)
        self._dots[parameter.name][pass_.samples] += dots

    def on_end(self, batch: Batch[ScoresT]) -> ScoresT:
        """Return the dots, and tell the observers."""
        dots = {name: values / self.loss_scale for name, values in self._dots.items()}
        tokens = None if self._tokens is None else self._tokens.total() / self.loss_scale
        scores = self.make_scores(batch, dots, tokens)
        for observer in self._observers:
            observer.scored(scores)
        return scores

    @abstractmethod
    def make_scores(
        self, batch: Batch[ScoresT], dots: Mapping[str, Tensor], token_dots: Tensor | None
    ) -> ScoresT:
        """Return the result of a batch.

        Args:
            batch: The batch.
            dots: Dots by parameter name, `[N, K]`.
            token_dots: Dots by token, `[N, T, K]`, if they were kept.
        """

    def on_close(self) -> None:
        """Let go of the sums."""
        self._dots = {}
        self._tokens = None

    def _check_positions(self) -> None:
        """Refuse rows whose samples are known, but not their positions."""
        if owned := [tracked.name for tracked in self.tracking.modules if tracked.row_owner]:
            raise CaptureError(
                f"gradients cannot be split by token: row_owner is given for {', '.join(owned)}",
                reason="it tells the sample of each row, but not its position",
                remedy=f"leave them out with exclude={','.join(owned)!r}, or make the engine "
                "without per_token=True",
            )
