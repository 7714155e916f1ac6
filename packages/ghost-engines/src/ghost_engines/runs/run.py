"""One object for a training loop, whatever is measured in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ghost_core import Batch, CaptureError, Engine, SampleIds
from ghost_core.arguments import module, scaler
from ghost_core.restoring import Leave
from ghost_engines.modes import Padding
from ghost_engines.runs.checkpoint import read_checkpoint
from ghost_engines.runs.choosing import Chooser
from ghost_engines.runs.config import RunConfig
from ghost_engines.runs.description import check_same, describe
from ghost_engines.runs.engines import (
    GivenDirections,
    add_directions,
    joining,
    make_engines,
    scorer_of,
    values_of,
)
from ghost_engines.runs.folder import RunFolder, lock_folder, place_of
from ghost_engines.runs.saved import Stateful, check_objects, load_beside, state_beside
from ghost_engines.selection import Chosen, Losses
from ghost_engines.store import WriterLock
from ghost_engines.values import CreditedStep, InRunValues, skipped, stepping
from ghost_engines.weighing import WeighingEngine


class Run:
    """Measures a training loop: attaches engines, adds up values, writes them to a folder.

        with Run(model, optimizer, RunConfig(folder="runs/a"), directions={"val": loss}) as run:
            for batch in loader:
                with run.batch(take_ids(batch)):
                    loss_fn(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            run.values.to_pandas()

    The loop is the user's own: open a batch for each micro-batch or one around all, clip, unscale,
    skip steps. Whatever runs outside of `batch` is left alone. With `method="none"` the same loop
    measures nothing. The folder is begun with the first batch: `run.json` says what the run is,
    `log` is a `ScoreLog` of its steps, `metrics.jsonl` has what `record` is told, and
    `checkpoint.pt` what `save` is. Where several processes train, each writes `rank-R` inside.

    Args:
        model: The module that the training loop calls.
        optimizer: The optimizer that makes the steps, or a wrapper that has it in `.optimizer`.
        config: What to do, as a `RunConfig` or a mapping of its fields.
        directions: Validation losses by name: closures that return one, or directions as tensors.
            Mode "concatenated" takes none, and method "none" makes no use of them.
        grad_scaler: The scaler that multiplies the loss, if one does.

    Attributes:
        config: The config.
        engines: The engines by name.
        steps: Number of steps that the optimizer made.
        adds_up: Whether it adds up values.

    Raises:
        UnknownNameError: If a field, method, mode, option, policy or target does not exist.
        CaptureError: If a value does not fit, an engine scores and there is no direction, or values
            are asked for where nothing scores.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: RunConfig | Mapping[str, Any],
        *,
        directions: GivenDirections = MappingProxyType({}),
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.config = config if isinstance(config, RunConfig) else RunConfig.of(config)
        self._scaler = scaler(grad_scaler)
        self._optimizer = optimizer
        self.engines: Mapping[str, Engine[Any]] = (
            engines := make_engines(self.config, module(model), self._scaler)
        )
        add_directions(engines, directions, self.config)
        self._scorer = scorer_of(engines)
        self._joint = joining(self._scorer, self.config)
        self.adds_up = self.config.values is not False and self._scorer is not None
        if self.config.values and not self.adds_up:
            raise CaptureError(
                "values=True, and no method scores batches",
                remedy="add dot_product to the methods, or leave values out",
            )
        self._chooser = Chooser(self.config.chooses, self.config.target, self._scorer)
        self._is = describe(self.config, model, optimizer, self._scaler, engines, self.adds_up)
        self.steps = 0
        self._values: InRunValues | None = None
        self._folder: RunFolder | None = None
        self._attached = ExitStack()
        self._entered = False

    def __repr__(self) -> str:
        """Say what it measures, where, and how far it is."""
        method = ", ".join(self.engines) or "nothing"
        return f"<{type(self).__name__}: {method}, {self.steps} steps, {self.config.folder}>"

    def __enter__(self) -> Self:
        if self._entered:
            raise CaptureError("a run is entered once: make another one, and resume it")
        self._entered = True
        stack = self._attached
        try:
            for engine in self.engines.values():
                stack.push(stack.enter_context(engine))  # twice: an interrupt may end the first
            if self.adds_up and (scorer := self._scorer) is not None:
                self._values = values_of(stack, scorer, self._optimizer, self.config)
                self._values.on_credit(self._credited)
            # After the values' own, which are added up by then.
            stack.callback(stepping(self._optimizer).register_step_post_hook(self._stepped).remove)
            stack.callback(self._chooser.say_if_unused)
            return self
        except BaseException:
            stack.close()
            raise

    __exit__: Callable[..., None] = Leave(attrgetter("_attached.__exit__"))

    # The loop

    @contextmanager
    def batch(
        self,
        ids: SampleIds,
        *,
        owners: Mapping[str, Tensor] = MappingProxyType({}),
        loss_weights: float | Tensor | None = None,
    ) -> Iterator[Mapping[str, Batch[Any]]]:
        """Measure the forward and backward passes of one batch, or of one micro-batch.

        Args:
            ids: One integer per sample, `[N]`.
            owners: As in `Engine.batch`.
            loss_weights: As in `HoldingEngine.batch`, for engines made with `loss_weights`.

        Yields:
            The engines' batches by the engine's name, whose results are there once it is closed.

        Raises:
            CaptureError: If the run is not entered, its folder has another run, or as in
                `Engine.batch`.
            WrongSplitError: If gradients cannot be split by sample.
        """
        self._writer()
        with ExitStack() as stack:
            batches = {}
            for name, engine in self.engines.items():
                told = isinstance(engine, WeighingEngine) and engine.loss_weights is not None
                weights = {"loss_weights": loss_weights} if told else {}
                batches[name] = stack.enter_context(engine.batch(ids, owners=owners, **weights))
            yield MappingProxyType(batches)

    def select(
        self,
        losses: Losses,
        ids: SampleIds,
        *,
        owners: Mapping[str, Tensor] = MappingProxyType({}),
        **options: Any,
    ) -> Chosen:
        """Choose which candidates to train on, by the config's policy, before the batch.

            chosen = run.select(lambda: per_sample_loss(model, batch), ids)
            with run.batch(chosen.ids):
                per_sample_loss(model, batch[chosen.indices]).mean().backward()

        Args:
            losses: As in `ScoringEngine.score`; not called where the policy needs no dots.
            ids: One integer per candidate, `[N]`.
            owners: As in `Engine.batch`.
            options: Options of the policy that the config leaves open, or that change by the step.

        Raises:
            CaptureError: If the config names no policy, it cannot be made of these options, a batch
                is open, or as `ScoringEngine.score` and `CandidateScores.choose` do.
            WrongSplitError: If gradients cannot be split by sample.
        """
        self._writer()
        return self._chooser.choose(losses, ids, owners, options)

    def join(self, train: Any, validation: Any, *, pad: Padding = None) -> Any:
        """Return what to call the model on: `train`, or both in one in mode "concatenated".

        Args:
            train: A training batch: see `DotProductEngine.concatenate`.
            validation: A validation batch, of which other modes make no use.
            pad: What shorter sequences are filled up with.

        Raises:
            CaptureError: As `DotProductEngine.concatenate` does.
        """
        joint = self._joint
        return train if joint is None else joint.concatenate(train, validation, pad=pad)

    def backward(
        self, losses: Tensor, *, train_weight: float | Tensor, validation_weight: float | Tensor
    ) -> None:
        """Backpropagate losses inside a batch, by the same line whatever the mode.

        The training loss is `(train_weight * losses).sum()`, times the scale of the scaler. In mode
        "concatenated", losses of the validation samples follow those of the training samples: see
        `DotProductEngine.backward`. In others there are none, and `validation_weight` weighs
        nothing. Where losses are not given by sample, call `loss.backward()` as ever.

        Args:
            losses: One loss for each sample that the model was called on.
            train_weight: Weight of training samples, one number or `[N]`: 1 / N for their mean.
            validation_weight: Weight of validation samples, one number or `[M]`.

        Raises:
            CaptureError: As `DotProductEngine.backward` does.
        """
        joint = self._joint
        if joint is not None:
            joint.backward(losses, train_weight=train_weight, validation_weight=validation_weight)
            return
        loss = (train_weight * losses).sum()
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Leave the model alone inside, also where a batch is open."""
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.paused())
            yield

    def record(self, **metrics: float | Tensor) -> None:
        """Keep numbers such as the loss, for `metrics.jsonl`, with the number of steps so far.

        Raises:
            CaptureError: If one is no number, or is called "step", or the run is not entered.
        """
        self._writer().metrics.add(self.steps, metrics)

    # What came of it

    @property
    def folder(self) -> Path:
        """Where this process writes."""
        return place_of(self.config.folder)

    @property
    def is_open(self) -> bool:
        """Whether an engine has a batch open."""
        return any(engine.is_open for engine in self.engines.values())

    @property
    def values(self) -> InRunValues:
        """The values so far; they stay when the run is left.

        Raises:
            CaptureError: If none are added up, or the run was not entered.
        """
        if self._values is None:
            raise CaptureError(
                "the run has no values",
                reason="its config says so, nothing scores, or it was not entered",
                remedy="make it with a method that scores, and use it as: with run: ...",
            )
        return self._values

    def commit(self) -> None:
        """Have the log and the metrics on disk; every `log_every` steps that is done anyway.

        Raises:
            OSError: If that fails.
        """
        self._writer().commit()

    # Going on in another process

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, to save with the model's checkpoint; the log is committed first.

        Raises:
            OSError: If the log cannot be written.
        """
        self.commit()
        return {
            "description": self._is,
            "steps": self.steps,
            "values": None if self._values is None else self._values.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run did whose state it is, before the first batch.

        Raises:
            CaptureError: If the run is not entered or has begun, or was another; the message names
                the field.
            StoreError: If the log in the folder ends before that state.
        """
        self._check_entered(begins=True)
        self._load(state, None)

    def _load(self, state: Mapping[str, Any], lock: WriterLock | None) -> None:
        check_same(state["description"], self._is, "the state")
        self._writer(after=state["steps"], lock=lock)
        if self._values is not None:
            self._values.load_state_dict(state["values"])
        self.steps = state["steps"]

    def save(self, **objects: Stateful) -> None:
        """Write `checkpoint.pt` in the folder, as a whole or not at all.

            run.save(model=model, optimizer=optimizer, schedule=schedule)

        It has the run's own state, that of these objects, and that of torch's random number
        generators. Call it between a step and the next batch.

        Args:
            objects: What is saved along, by name.

        Raises:
            OSError: If that fails; then the last checkpoint is still there.
        """
        self._writer().save({"run": self.state_dict(), **state_beside(objects)})

    def resume(self, **objects: Stateful) -> int:
        """Go on from `checkpoint.pt` if there is one, else from the beginning.

        Where a process was killed before its first checkpoint, its steps are made anew. Several
        processes, which may not have been killed at the same moment, go on from the last step that
        all of them have saved.

        Args:
            objects: What `save` was given.

        Returns:
            The number of steps that were made: 0 for a run that begins.

        Raises:
            CaptureError: If the objects are others, processes have no step in common, or as in
                `load_state_dict`.
            StoreError: If the log in the folder ends before the checkpoint.
        """
        self._check_entered(begins=True)
        locks: list[WriterLock] = []
        try:
            state = read_checkpoint(self.folder, lambda: locks.append(lock_folder(self.folder)))
            return self._go_on(state, locks[0], objects)
        finally:
            for lock in locks if self._folder is None else ():
                lock.release()

    def _go_on(
        self, state: dict[str, Any] | None, lock: WriterLock, objects: Mapping[str, Stateful]
    ) -> int:
        """Go on from a checkpoint, in a folder that is locked, and return the number of steps."""
        if state is None:
            self._writer(after=0, lock=lock)
            return 0
        check_objects(objects, state)
        self._load(state["run"], lock)
        load_beside(objects, state)
        return self.steps

    def _check_entered(self, *, begins: bool = False) -> None:
        if not self._entered:
            raise CaptureError("the run is not entered", remedy="with Run(...) as run: ...")
        if begins and self._folder is not None:
            raise CaptureError("the run has begun", remedy="load its state once it is entered")

    def _writer(self, after: int | None = None, lock: WriterLock | None = None) -> RunFolder:
        """Return the folder, which is begun where it is first asked for."""
        if self._folder is None:
            self._check_entered()
            logs = self._values is not None
            folder = RunFolder.open(self.folder, self._is, after=after, logs=logs, lock=lock)
            self._folder = self._attached.push(self._attached.enter_context(folder))
        return self._folder

    def _credited(self, step: CreditedStep) -> None:
        log = self._writer().log
        assert log is not None
        log.append(step)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if skipped(optimizer):
            return
        self.steps += 1
        if self.steps % self.config.log_every == 0:
            self.commit()
