"""Hugging Face's Trainer, with a run inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from ghost_core import CaptureError, MissingExtraError
from ghost_core.state import random_state_kept
from ghost_engines.ids import ID_FIELD, take_ids, with_ids
from ghost_engines.runs import Run, RunConfig, read_state, write_state
from ghost_engines.values import CreditedStep, InRunValues

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingExtraError("transformers", "ghost-engines[hf]", "GhostTrainer") from error


class GhostCallback(TrainerCallback):
    """Holds the run of a `GhostTrainer`, and writes it into every checkpoint.

    Give it to the trainer in `callbacks`. The run is made when training begins, since there is no
    optimizer before.

    Args:
        config: What to do, as a `RunConfig` or a mapping of its fields.
        directions: Validation losses by name: data sets, of whose samples the model's own loss is
            taken in one batch, made by the trainer's collator; or closures that return a loss.

    Attributes:
        run: The run, once training began.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any],
        directions: Mapping[str, Sized | Callable[[], Tensor]] = MappingProxyType({}),
    ) -> None:
        self.config = config if isinstance(config, RunConfig) else RunConfig.of(config)
        self.directions = directions
        self.run: Run | None = None
        self._trainer: Any = None
        self._checkpoint: Path | None = None
        self._stack = ExitStack()
        self._credited: dict[str, float] = {}

    @property
    def values(self) -> InRunValues:
        """The values so far; they stay when training ends.

        Raises:
            CaptureError: If training did not begin, or the run has none.
        """
        if self.run is None:
            raise CaptureError("there are no values before trainer.train() is called")
        return self.run.values

    # Called by GhostMixin

    @contextmanager
    def training(self, trainer: Any, checkpoint: str | bool | None) -> Iterator[None]:
        """Have a run around what a trainer trains, from a checkpoint folder if there is one."""
        if trainer.args.auto_find_batch_size:
            raise CaptureError(
                "auto_find_batch_size begins training anew where memory ends",
                remedy="set auto_find_batch_size=False",
            )
        found = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
        self._checkpoint = Path(found) if found else None
        self._trainer = trainer
        try:
            with self._stack:
                yield
        finally:
            self._trainer = None

    def credited(self) -> dict[str, float]:
        """Return what was credited since the last call, to all samples, by direction."""
        found, self._credited = self._credited, {}
        return {f"ghost_value_{name}": value for name, value in found.items()}

    # Called by the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the run, and resume it."""
        trainer = self._trainer
        if trainer is None:
            raise CaptureError(
                "GhostCallback needs a trainer that opens batches",
                reason="a callback sees no inputs, and is called after gradients are clipped",
                remedy="use GhostTrainer, or class YourTrainer(GhostMixin, ...)",
            )
        directions = {name: _loss_of(trainer, each) for name, each in self.directions.items()}
        scaler = trainer.accelerator.scaler
        model, optimizer, config = (
            trainer.model_wrapped,  # what the trainer calls
            trainer.optimizer,
            _owning(self.config, trainer),
        )
        run = Run(model, optimizer, config, directions=directions, grad_scaler=scaler)
        self.run = self._stack.enter_context(run)
        if self._checkpoint is not None:
            run.load_state_dict(read_state(_file(self._checkpoint, args)))
        if run.adds_up:
            run.values.on_credit(self._on_credit)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the run's state into the checkpoint that was just saved."""
        if self.run is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_state(_file(folder, args), self.run.state_dict())

    def _on_credit(self, step: CreditedStep) -> None:
        for name, value in zip(step.directions, step.values.sum(0).tolist(), strict=True):
            self._credited[name] = self._credited.get(name, 0.0) + value


class GhostMixin:
    """Makes a trainer open a batch around each of its training steps.

    For `Trainer` there is `GhostTrainer`; others are made of it in a line, `GhostMixin` first:

        class GhostSFTTrainer(GhostMixin, SFTTrainer): ...

    It needs a `GhostCallback`, ids in the batches (see `with_ids` and `IdCollator`), and
    `TrainingArguments(remove_unused_columns=False)`, which would take them away.
    """

    row_owner: ClassVar[Mapping[str, str]] = {}
    """Where the model is called on rows that are no samples: what engines take as `row_owner`."""

    @property
    def ghost(self) -> GhostCallback:
        """The callback.

        Raises:
            CaptureError: If there is not one of them.
        """
        callbacks = self.callback_handler.callbacks  # type: ignore[attr-defined]
        found = [each for each in callbacks if isinstance(each, GhostCallback)]
        if len(found) != 1:
            raise CaptureError(
                f"{type(self).__name__} has {len(found)} callbacks of ghost's",
                remedy="give it one: callbacks=[GhostCallback(config, directions)]",
            )
        return found[0]

    def owners_of(self, inputs: Mapping[str, Any], ids: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors that `row_owner` names."""
        return {}

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train inside a run; see `Trainer.train`."""
        with self.ghost.training(self, resume_from_checkpoint):
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Take the ids out of the inputs, and open a batch around the forward and backward pass."""
        inputs = copy.copy(inputs)  # the trainer looks at its own again
        ids = take_ids(inputs)
        run = self.ghost.run
        assert run is not None
        with run.batch(ids, owners=self.owners_of(inputs, ids)):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the ids out of the inputs; evaluation is outside of batches."""
        inputs = copy.copy(inputs)
        inputs.pop(ID_FIELD, None)
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to what is logged of training what its steps credited, for all loggers."""
        more = self.ghost.credited() if "loss" in logs else {}
        super().log({**logs, **more}, *args, **kwargs)  # type: ignore[misc]


class GhostTrainer(GhostMixin, Trainer):
    """Hugging Face's `Trainer` with in-run values: see `GhostCallback`."""


def _owning(config: RunConfig, trainer: Any) -> RunConfig:
    """Return a config whose engines know who owns the rows of a trainer's batches."""
    if not trainer.row_owner:
        return config
    owned = {"row_owner": dict(trainer.row_owner)}
    options = {name: {**config.options.get(name, {}), **owned} for name in config.engines}
    return replace(config, options=options)


def _loss_of(trainer: Any, given: Any) -> Callable[[], Tensor]:
    """Return the closure of a direction."""
    if callable(given):
        return given  # type: ignore[no-any-return]
    samples = [given[at] for at in range(len(given))]
    if samples and ID_FIELD not in samples[0]:
        numbered = with_ids(samples)
        samples = [numbered[at] for at in range(len(samples))]
    with random_state_kept():  # collators may draw
        batch = trainer.data_collator(samples)
    inputs = {
        name: each.to(trainer.args.device) if isinstance(each, Tensor) else each
        for name, each in batch.items()
        if name != ID_FIELD
    }
    return partial(_model_loss, trainer, inputs)


def _model_loss(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    outputs = trainer.model(**inputs)
    loss: Tensor | None = getattr(outputs, "loss", None)
    if loss is None:
        raise CaptureError(
            f"{type(trainer.model).__name__} returns no loss of its own",
            remedy="give directions as closures that return a loss",
        )
    return loss


def _file(folder: Path, args: Any) -> Path:
    return folder / (f"ghost-{args.process_index}.pt" if args.world_size > 1 else "ghost.pt")
