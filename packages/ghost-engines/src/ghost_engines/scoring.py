"""Engines that multiply the gradients of a batch with directions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, Unpack

import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    CaptureError,
    Engine,
    EngineOptions,
    Pass,
    PerSampleGradient,
    SampleIds,
    TrackedParameter,
)
from ghost_core.algebra import accumulation_dtype, as_rows
from ghost_core.arguments import switch
from ghost_core.capture import Recorder, not_attached, open_already
from ghost_core.restoring import restored, undo
from ghost_engines.directions import Closure, Directions, FactoredDirection, Transform
from ghost_engines.dot_sums import DotSums
from ghost_engines.scores import Scores
from ghost_engines.selection import Candidates, CandidateScores, Losses
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
        self._takes_factors = False  # directions are built
        self._directions = Directions(self.model, self.parameters, self.ranks)
        self._stacked: dict[str, Tensor] = {}
        self._dots = DotSums({}, 0, 0)
        self._tokens: TokenSum | None = None
        self._observers: list[ScoreObserver] = []
        self._candidates: Candidates | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether the engine was given a `grad_scaler`, which may skip steps."""
        return self._grad_scaler is not None

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the directions, in the order of their columns."""
        return self._directions.names

    @property
    def scale(self) -> float:
        """What contributions to the open batch are multiplied with where gradients arrive.

        A scaler multiplies the loss, and is divided out. Each of several processes adds its
        gradients to an average, in which a sample's part is so many times smaller.
        """
        return self.loss_scale * self.ranks.count

    def add_direction(
        self,
        name: str,
        direction: Closure | FactoredDirection | Mapping[str, Tensor],
        *,
        refresh: int | None = None,
        transform: Transform | None = None,
        training: bool = False,
    ) -> None:
        """Add a direction, or replace the one of this name.

        Args:
            name: Its name.
            direction: A closure that returns the scalar loss whose gradient is the direction, or
                one that returns the direction itself, a tensor for each tracked parameter by name;
                these tensors; or a `FactoredDirection`. The closure runs in evaluation mode and
                leaves no trace; a single direction can be linear in many validation samples.
            refresh: Batches after which it is made anew; by default 1, so that the direction always
                belongs to the current parameters. Tensors without a transform stay as they are.
            transform: What to make of it: `adam_aware(optimizer)`, `second_order(step)`,
                `unit_norm`, or a function that takes a direction by parameter name and returns
                another.
            training: Whether the closure runs with the model as it is, instead of in evaluation
                mode.

        Raises:
            UnknownNameError: If a name is no parameter of the model.
            CaptureError: If a tracked parameter is missing, a shape or value is wrong, the closure
                takes arguments, `refresh` is not positive, or an option goes with a closure only.
        """
        self._directions.add(
            name,
            direction,
            refresh=refresh,
            transform=transform,
            training=training,
            factors=self._takes_factors,
        )

    def direction(self, name: str) -> dict[str, Tensor]:
        """Return a direction as it was in the last batch, or as it would be now before the first.

        Returns:
            A tensor for each tracked parameter by name; `save_direction` writes it to a file.

        Raises:
            UnknownNameError: If there is none of this name.
            CaptureError: If it cannot be made.
        """
        with self.paused():
            return self._directions[name].current()

    def curvature(self, name: str, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `H step`, with the Hessian H of the loss that a direction is the gradient of.

        It is computed where the parameters are now, at the price of one Hessian-vector product.
        Several processes that train the model ask for it together, and average their steps.

        Args:
            name: The direction's name.
            step: A change of each tracked parameter by name.

        Raises:
            UnknownNameError: If there is no direction, or no parameter, of a name.
            CaptureError: If it was given as tensors, or transformed, or the step lacks a tracked
                parameter or is of another shape.
        """
        with self.paused():
            return self._directions[name].curvature(step)

    def remove_direction(self, name: str) -> None:
        """Remove a direction.

        Raises:
            UnknownNameError: If there is none of this name.
        """
        self._directions.remove(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of directions that are not made anew in each batch.

        After `load_state_dict` in another process, scores go on as they would have in this one.
        `InRunValues.state_dict` has it inside.
        """
        return {"directions": self._directions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the engine did whose state it is, with the same directions added.

        Raises:
            CaptureError: If it had others.
        """
        self._directions.load_state_dict(state["directions"])

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Score candidates inside, before the step that trains on some of them.

        Directions that are due are renewed once, which counts as a batch for `refresh`; parameters
        are frozen, so that no weight gradient is made and no hook on one runs. An engine that is
        attached stays so; one that is not is attached meanwhile, and then verifies the split anew
        each time. Observers such as `InRunValues` hear of nothing.

        Raises:
            CaptureError: If a batch is open, there is no direction, or other engines are attached
                to the model and this one is not.
        """
        recorder = self._recorder or Recorder.of(self.model)
        if self._recorder is None and recorder.attached:
            raise not_attached()
        self.ranks.check_way("engine.scoring()")
        if self.is_open or self._candidates is not None:
            raise open_already()
        self._check_flags(frozen=bool(recorder.flags))
        with self.paused():
            stacked = self._directions.renewed()
        if any(len(each) != len(self.directions) for each in stacked.values()):
            raise CaptureError(
                "candidates cannot be scored by this engine",
                reason="its direction comes with each batch, and there is none before",
                remedy="make another engine for it, in mode='exact' or mode='fused'",
            )
        candidates = Candidates(
            self.model, recorder, self.tracking, self.verifies, stacked, self.directions
        )
        with restored() as stack:
            undo(stack, setattr, self, "_candidates", None)
            stack.enter_context(recorder.aside(candidates))
            self._candidates = candidates
            yield

    def score(
        self,
        losses: Losses,
        ids: SampleIds,
        *,
        gram: bool = False,
        owners: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> CandidateScores:
        """Score candidates, inside `scoring`: in a pass of its own, which leaves no trace.

        The model runs as it is, in training or evaluation mode. Its buffers and modes, `.grad` and
        the random number generators are as before afterwards, so that a step on those chosen is one
        of plain training on them.

        Args:
            losses: Runs the model on the candidates, and returns the own loss of each, floating
                `[N]`.
            ids: One integer per candidate, `[N]`.
            gram: Whether to multiply the candidates' gradients with each other too, which needs all
                of them at once.
            owners: As in `Engine.batch`.

        Returns:
            Dots with each direction; its `choose` chooses.

        Raises:
            CaptureError: If it is called outside of `scoring`, losses are not one finite number per
                candidate, or the model ran on others.
            WrongSplitError: If gradients cannot be split by sample.
        """
        if self._candidates is None:
            raise CaptureError(
                "candidates are scored inside of with engine.scoring(): ...",
                reason="there the model's parameters are frozen, and its directions made",
                remedy="open it around engine.score(...), and close it before the step",
            )
        scale = 1.0 if self._grad_scaler is None else self._grad_scaler.get_scale()
        with self.ranks.apart():
            return self._candidates.score(
                losses, ids, gram=switch("gram", gram), scale=scale, owners=owners
            )

    def observe(self, observer: ScoreObserver) -> None:
        """Tell an observer of every batch from now on."""
        self._observers.append(observer)

    def unobserve(self, observer: ScoreObserver) -> None:
        """Stop to tell an observer, if it is told."""
        if observer in self._observers:
            self._observers.remove(observer)

    def on_start(self, batch: Batch[ScoresT]) -> None:
        """Renew the directions that are due."""
        if self._candidates is not None:
            raise CaptureError(
                "a batch was opened inside of engine.scoring()",
                reason="parameters are frozen there, so that no step can follow",
                remedy="leave it before the batch that is trained on",
            )
        self.ranks.check_averaged()
        for observer in self._observers:
            observer.starting()
        with self.paused() if self._directions.due else nullcontext():
            self._stacked = self._directions.renewed()
        self._dots = DotSums(self._stacked, batch.n, len(self.directions))
        if self._per_token:
            dtype = accumulation_dtype(*self._stacked.values())
            shape, device = (batch.n, 0, len(self.directions)), self.parameters[0].device
            self._tokens = TokenSum(torch.zeros(shape, dtype=dtype, device=device))

    def on_call(self) -> None:
        """Refuse a wrapper that averages gradients and that the engine does not know of."""
        self.ranks.check_caller()

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Multiply with the directions, and tell the observers."""
        for observer in self._observers:
            observer.arriving(pass_, parameter, gradient)
        return self.multiply(pass_, parameter, gradient)

    def multiply(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Multiply with the directions; return what `on_gradient` is to return."""
        stacked = self._stacked[parameter.name]
        if self._tokens is None:
            dots = gradient.dot(stacked)
        else:
            by_token = gradient.token_dot(stacked)
            self._tokens.add(pass_, parameter.name, by_token)
            dots = by_token.sum(1)
        self._dots.add(parameter.name, pass_.samples, dots)
        return None

    def on_end(self, batch: Batch[ScoresT]) -> ScoresT:
        """Return the dots, and tell the observers."""
        dots, scale = self._dots.total(), self.scale
        if scale != 1:
            dots = {name: values / scale for name, values in dots.items()}
        tokens = None if self._tokens is None else self._tokens.total() / scale
        scores = self.make_scores(batch, dots, tokens)
        for observer in self._observers:
            observer.scored(scores)
        return scores

    def squared_direction_norms(self) -> dict[str, Tensor]:
        """Return the squared norms of the directions by parameter name, `[K]`."""
        return {
            name: torch.linalg.vector_norm(as_rows(stacked), dim=1).square()
            for name, stacked in self._stacked.items()
        }

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
        self._dots = DotSums({}, 0, 0)
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
