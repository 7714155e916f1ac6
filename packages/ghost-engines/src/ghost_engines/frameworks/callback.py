"""The run of a Hugging Face Trainer: when it begins, what it is made of, where it is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ghost_core import CaptureError, MissingExtraError
from ghost_engines.frameworks.holder import RunHolder
from ghost_engines.frameworks.validation import loss_of
from ghost_engines.runs import Run, RunConfig, read_state, write_state

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingExtraError("transformers", "ghost-engines[hf]", "GhostCallback") from error


class GhostCallback(RunHolder, TrainerCallback):
    """Holds the run of a `GhostTrainer`, and writes it into every checkpoint.

    Give it to the trainer in `callbacks`. The run is made when training begins, since there is no
    optimizer before.

    Args:
        config: What to do, as a `RunConfig` or a mapping of its fields.
        directions: Validation losses by name: data sets, of whose samples the model's own loss is
            taken in one batch, made by the trainer's collator; or closures that return a loss.

    Attributes:
        config: The config.
        run: The run, once training began.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any],
        directions: Mapping[str, Sized | Callable[[], Tensor]] = MappingProxyType({}),
    ) -> None:
        super().__init__(config)
        self.directions = directions
        self._trainer: Any = None
        self._checkpoint: Path | None = None

    # Called by the trainer of ghost's

    @contextmanager
    def training(self, trainer: Any, checkpoint: str | bool | None) -> Iterator[None]:
        """Have a run around what a trainer trains, from a checkpoint folder if there is one."""
        _check_arguments(trainer)
        found = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
        self._checkpoint = Path(found) if found else None
        self._trainer = trainer
        try:
            with self._inside:
                yield
        finally:
            self._trainer = None

    # Called by the trainer of transformers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the run, and resume it."""
        trainer = self._trainer
        if trainer is None:
            raise CaptureError(
                "GhostCallback needs a trainer that opens batches",
                reason="a callback sees no inputs, and is called after gradients are clipped",
                remedy="use GhostTrainer, or class YourTrainer(GhostMixin, ...)",
            )
        directions = {name: loss_of(trainer, name, each) for name, each in self.directions.items()}
        scaler = trainer.accelerator.scaler
        model, optimizer, config = (
            trainer.model_wrapped,  # what the trainer calls
            trainer.optimizer,
            _owning(self.config, trainer),
        )
        run = Run(model, optimizer, config, directions=directions, grad_scaler=scaler)
        found = self._checkpoint
        self.begin(run, None if found is None else read_state(_file(found, args)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the run's state into the checkpoint that was just saved."""
        if self.run is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_state(_file(folder, args), self.run.state_dict())


def _check_arguments(trainer: Any) -> None:
    """Refuse what begins training anew on its own, in the folder of the run before, or compiles."""
    if trainer.args.auto_find_batch_size:
        raise CaptureError(
            "auto_find_batch_size begins training anew where memory ends",
            remedy="set auto_find_batch_size=False",
        )
    if trainer.args.torch_compile:
        raise CaptureError(
            "torch_compile makes a model that ignores hooks",
            reason="it is compiled before training begins, and hooks are added then",
            remedy="set torch_compile=False, or choose a loop of your own, which can score in "
            "steps that are not compiled",
        )
    if trainer.hp_search_backend is not None:
        raise CaptureError(
            "hyperparameter_search trains several models with one callback",
            remedy="search without ghost, and train with what was found",
        )


def _owning(config: RunConfig, trainer: Any) -> RunConfig:
    """Return a config whose engines know who owns the rows of a trainer's batches."""
    if not trainer.row_owner:
        return config
    owned = {"row_owner": dict(trainer.row_owner)}
    options = {name: {**config.options.get(name, {}), **owned} for name in config.engines}
    return replace(config, options=options)


def _file(folder: Path, args: Any) -> Path:
    return folder / (f"ghost-{args.process_index}.pt" if args.world_size > 1 else "ghost.pt")
