"""Dot products of per-sample gradients with directions, while training runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    CaptureError,
    EngineOptions,
    Pass,
    PerSampleGradient,
    TrackedParameter,
)
from ghost_core.algebra import Reduced, as_rows, building_at_most, full_precision
from ghost_engines.directions import Factors, Uses, dots_with, squared_norm_of
from ghost_engines.modes import (
    Concatenation,
    InBatch,
    Mode,
    Padding,
    SmallOnes,
    Terms,
    as_mode,
    check_tracked,
)
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine


class DotProductEngine(ScoringEngine[Scores]):
    """Scores every training sample against directions, from the training's own backward pass.

    The dots serve In-Run Data Shapley (Wang et al., 2024, eq. 6): see `InRunValues`. They are the
    same in each mode:

    * `mode="exact"`: training is bit-identical with and without the engine;
    * `mode="fused"`: the engine forms the weight gradient sample by sample, multiplies each while
      it is in the cache, and hands their sum to the training. That takes less, and `.grad` is that
      of plain training up to rounding;
    * `mode="concatenated"`: training and validation samples go through the model in one batch,
      which `concatenate` makes and `backward` backpropagates. The only direction is the gradient
      of the validation samples, "validation"; that of a layer is dropped once its samples are
      scored. `.grad` is that of the training samples alone, up to rounding. Several processes
      average the direction of each layer, over whatever validation samples each of them has.

    Args:
        model: The module that the training loop calls.
        mode: How dots come about: "exact", "fused" or "concatenated".
        norms: Whether to take squared norms of contributions too: `Scores.norms` and
            `Scores.cosines`. Gradients of parameters that are used several times are held until the
            batch is closed.
        per_token: As in `ScoringEngine`. In fused mode it saves nothing, in concatenated mode it is
            refused.
        memory_budget: Bytes that intermediates may take at once, but for those of one sample; over
            it, samples are worked through in parts. By default 128 MiB.
        options: What all engines take: see `Engine`. With `grad_scaler`, a batch whose gradients
            overflow has scores that are not finite.

    Raises:
        UnknownNameError: If a glob matches nothing, or there is no such mode.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
        CaptureError: If no trainable parameter is selected, a module is compiled, `row_owner` is
            given for one whose gradients are to be kept by token, or not all trainable parameters
            are selected in concatenated mode, or `memory_budget` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: str = "exact",
        norms: bool = False,
        per_token: bool = False,
        memory_budget: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(model, per_token=per_token, **options)
        if memory_budget is not None and memory_budget <= 0:
            raise CaptureError(f"memory_budget must be a number of bytes, not {memory_budget}")
        self._memory_budget = memory_budget
        chosen = as_mode(mode)
        self.freeze = chosen.freeze
        self.plain_sums = chosen is not Mode.CONCATENATED
        self._takes_norms = norms
        self._terms: Terms | None = None
        self._takes_factors = not per_token
        self._uses: dict[str, dict[int, Uses]] = {}
        self._of_directions: dict[str, Tensor] = {}
        self._small = SmallOnes()
        self._both: Concatenation | None = None
        if chosen is Mode.CONCATENATED:
            if per_token:
                raise CaptureError("per_token=True does not go with mode='concatenated'")
            check_tracked(self.model, self.tracking)
            self._directions = InBatch(self.model, self.parameters)
            self._both = Concatenation(self.tracking, self.ranks)

    # For users, in concatenated mode

    def concatenate(self, train: Any, validation: Any, *, pad: Padding = None) -> Any:
        """Join a training and a validation batch into one, for the model to be called on.

        Call it before each batch:

            both = engine.concatenate(train, validation)
            with engine.batch(ids) as scored:  # ids of the training samples
                losses = per_sample_loss(model, both)  # [N + M]
                engine.backward(losses, train_weight=1 / N, validation_weight=1 / M)

        Args:
            train: What the model is called on for N training samples: a tensor, or tuples, lists,
                dictionaries and outputs of transformers that hold tensors, nested at will. The
                size of the first tensor says how many samples there are. Tensors of other sizes
                have to be equal on both sides, and stay one.
            validation: The same for M validation samples.
            pad: What shorter sequences are filled up with at their ends, where lengths differ: one
                value, or one by dotted name such as `{"input_ids": 0, "labels": -100}`. The
                model's mask and the losses have to leave out what is filled up.

        Returns:
            The N training samples and behind them the M validation samples, in the same structure.

        Raises:
            CaptureError: If the engine has another mode, a batch is open, the batches differ in
                structure or dtype, or their lengths do and there is no value to pad with.
            UnknownNameError: If there is a value for a name that is not there.
        """
        both = self._concatenation()
        with both.together.telling():
            if self.is_open:
                raise CaptureError("call engine.concatenate() before engine.batch(ids)")
            return both.join(train, validation, pad)

    def backward(
        self, losses: Tensor, *, train_weight: float | Tensor, validation_weight: float | Tensor
    ) -> None:
        """Backpropagate the losses of a batch that `concatenate` made, inside `engine.batch`.

        The training loss is `(train_weight * losses[:N]).sum()`, and `.grad` is its gradient; the
        direction is that of `(validation_weight * losses[N:]).sum()`.

        Args:
            losses: One loss for each sample, `[N + M]`.
            train_weight: Weight of training samples, one number or `[N]`: 1 / N for their mean.
            validation_weight: Weight of validation samples, one number or `[M]`.

        Raises:
            CaptureError: If the engine has another mode, no batch is open, it was called before in
                this batch, or there is not one loss and one weight for each sample; or in another
                process that trains the model.
        """
        both = self._concatenation()
        with both.together.telling():
            if not self.is_open:
                raise CaptureError("call engine.backward() inside engine.batch(ids)")
            loss = both.weighted(losses, train_weight, validation_weight)
            both.run(loss if self._grad_scaler is None else self._grad_scaler.scale(loss))
            assert self._terms is not None
            self._of_directions |= both.finish(self._terms.held, self._dots)
            both.together.done()

    # As an engine

    def called_on(self, batch: Batch[Scores]) -> int:
        """Return how many samples the model is called on: those of validation too, if any."""
        return batch.n if self._both is None else sum(self._both.sizes(batch.n))

    def on_start(self, batch: Batch[Scores]) -> None:
        """Renew the directions that are due, and have no norms yet."""
        if self._both is not None:
            with self._both.together.telling():
                check_tracked(self.model, self.tracking)
                self._both.sizes(batch.n)
                self._both.together.start(self.loss_scale)
        else:
            self._capture_factors()
        super().on_start(batch)
        if self._both is None:
            self._uses = self._directions.uses
        if self._takes_norms or self._both is not None:
            known = "the norm of their sum" if self._both is None else "their product"
            other = "CosineEngine" if self._both is None else "mode='exact' or mode='fused'"
            self._terms = Terms(self.parameters, known, f"use {other}")

    def _capture_factors(self) -> None:
        for each in self._directions.factored:
            assert each.factored is not None
            assert each.source is not None
            assert self._recorder is not None
            factors = Factors(self.tracking, self.verifies, each.source, each.factored)
            factors.capture(self._recorder)
            each.keep(factors)

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Score the training samples, and tell the observers of them."""
        if self._both is None and self._memory_budget is None:
            if not self._observers:
                return self.multiply(pass_, parameter, gradient)
            return super().on_gradient(pass_, parameter, gradient)
        with self._budgeted():
            return self._scored(pass_, parameter, gradient)

    def _budgeted(self) -> AbstractContextManager[None]:
        return (
            nullcontext() if self._memory_budget is None else building_at_most(self._memory_budget)
        )

    def _scored(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        if self._both is None:
            return super().on_gradient(pass_, parameter, gradient)
        pass_, gradient, self._stacked[parameter.name] = self._both.split(pass_, gradient)
        try:
            return super().on_gradient(pass_, parameter, gradient)
        finally:
            del self._stacked[parameter.name]

    def multiply(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        """Multiply with the directions, take norms, and form the sum where it is wanted."""
        name, terms = parameter.name, self._terms
        alone = terms is None or terms.arrives_alone(pass_, parameter)
        directions: Tensor | None = self._stacked[name]
        if self._tokens is not None:
            super().multiply(pass_, parameter, gradient)
            directions = None
        elif self._both is not None and directions is not None:
            alone = alone and self._both.averages(name, directions)
            if alone and self._takes_norms:
                self._of_directions[name] = directions.square().sum().unsqueeze(0)
            if not alone:
                self._both.keep(name, directions)
                directions = None
        if directions is not None and not directions.shape[0]:
            directions = None
        # What is built for the sum anyway has its norm for little; products of terms come later.
        norms = self._takes_norms and (alone or self.makes_gradients)
        found = self._reduced(pass_, name, gradient, directions, norms=norms)
        self._add_dots(pass_, name, gradient, found.dots)
        if terms is not None and not alone:
            terms.held.add(pass_, parameter, gradient, found.squared_norms)
        elif terms is not None and found.squared_norms is not None:
            terms.add_norms(pass_, name, found.squared_norms)
        return found.total

    def _reduced(
        self,
        pass_: Pass,
        name: str,
        gradient: PerSampleGradient,
        directions: Tensor | None,
        *,
        norms: bool,
    ) -> Reduced:
        """Reduce a gradient to what is wanted of it now: the dots of small ones come later."""
        # Directions of samples in the batch are not to outlive their layer.
        lasting = directions if self._both is None and name not in self._uses else None
        if lasting is not None and self._small.takes(gradient, lasting):
            built = gradient.materialize()
            self._small.add(partial(self._dots.add, name, pass_.samples), built, lasting)
            squared = as_rows(built).square().sum(1) if norms else None
            return Reduced(built.sum(0) if self.makes_gradients else None, None, squared)
        return gradient.reduce(directions, norms=norms, total=self.makes_gradients)

    def _add_dots(
        self, pass_: Pass, name: str, gradient: PerSampleGradient, built: Tensor | None
    ) -> None:
        """Add dots with the directions that are built, and with those that are factors."""
        if uses := self._uses.get(name):
            columns = iter(() if built is None else built.unbind(1))
            dots = [
                dots_with(uses[at], gradient) if at in uses else next(columns)
                for at in range(len(self.directions))
            ]
            built = torch.stack(dots, 1)
        if built is not None:
            self._dots.add(name, pass_.samples, built)

    def squared_direction_norms(self) -> dict[str, Tensor]:
        """Return the squared norms of the directions by parameter name, `[K]`."""
        found = super().squared_direction_norms()
        for name, uses in self._uses.items():
            built = iter(found[name])
            found[name] = torch.stack(
                [
                    squared_norm_of(uses[at]).to(found[name]) if at in uses else next(built)
                    for at in range(len(self.directions))
                ]
            )
        return found

    def on_end(self, batch: Batch[Scores]) -> Scores:
        """Multiply what waited for others, and return the scores."""
        with full_precision(self.parameters[0].device):
            self._small.multiply()
        return super().on_end(batch)

    def make_scores(
        self, batch: Batch[Scores], dots: Mapping[str, Tensor], token_dots: Tensor | None
    ) -> Scores:
        """Return the dots, and the norms if they were taken."""
        squared = of_directions = None
        if self._takes_norms and self._terms is not None:
            with self._budgeted():
                squared = self._unscaled(self._terms.squared_norms(batch.n), 2, self.scale)
            of_directions = self.squared_direction_norms()
        if self._both is not None:
            dots = self._unscaled(dots, 1, self.loss_scale)  # both sides had the scale
            if self._takes_norms:
                none = {name: each.new_zeros(1) for name, each in dots.items()}
                of_directions = self._unscaled(none | self._of_directions, 2, self.loss_scale)
        return Scores(
            ids=batch.ids,
            verified=batch.verified,
            by_parameter=dots,
            directions=self.directions,
            token_dots=token_dots,
            squared_norms=squared,
            squared_direction_norms=of_directions,
        )

    def on_close(self) -> None:
        """Let go of the sums, and of the batch."""
        super().on_close()
        self._small.clear()
        self._terms, self._of_directions, self._uses = None, {}, {}
        if self._both is not None:
            self._stacked = {}
            self._both.close()

    def _unscaled(
        self, values: Mapping[str, Tensor], times: int, scale: float
    ) -> dict[str, Tensor]:
        """Return what is left where a scale is divided out that was multiplied so many times."""
        scale **= times
        return {name: each / scale if scale != 1 else each for name, each in values.items()}

    def _concatenation(self) -> Concatenation:
        if self._both is None:
            raise CaptureError(
                "this goes with DotProductEngine(model, mode='concatenated'); in other modes, call "
                "loss.backward() and give validation samples with add_direction"
            )
        return self._both
