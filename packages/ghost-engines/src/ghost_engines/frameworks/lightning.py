"""Lightning's Trainer, with a run inside."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

from ghost_core import CaptureError, MissingExtraError, UnknownNameError
from ghost_engines.frameworks.holder import RunHolder
from ghost_engines.ids import take_ids
from ghost_engines.runs import GivenDirections, Run, RunConfig, RunExistsError

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingExtraError("lightning", "ghost-engines[lightning]", "GhostLightning") from error


class GhostLightning(RunHolder, Callback):  # type: ignore[misc] # has no types
    """Measures what a Lightning `Trainer` fits: a callback for automatic optimization.

    Batches are dictionaries with ids (see `with_ids` and `IdCollator`), which are taken out before
    `training_step` sees them. The state goes into Lightning's checkpoints.

    Args:
        config: What to do, as a `RunConfig` or a mapping of its fields.
        directions: Validation losses by name: closures that return one, or tensors.
        module: Dotted name of the module that `training_step` calls; by default it calls
            `self(...)`, which is the `LightningModule`.

    Attributes:
        run: The run, once training began.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any],
        directions: GivenDirections = MappingProxyType({}),
        *,
        module: str = "",
    ) -> None:
        super().__init__(config)
        self.directions = directions
        self.module = module
        self._batch = ExitStack()
        self._loaded: dict[str, Any] | None = None
        self._measured = False  # a batch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the run, when optimizers are there and a checkpoint was loaded.

        Raises:
            UnknownNameError: If there is no such module.
            CaptureError: If optimization is manual, there are several optimizers or processes, or
                the run cannot be made or resumed.
        """
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise CaptureError(
                "GhostLightning follows automatic optimization with one optimizer",
                reason="nobody else tells where a batch ends",
                remedy="open batches in your training_step: with run.batch(ids): ...",
            )
        if trainer.world_size > 1:
            raise CaptureError(
                "GhostLightning follows one process",
                reason="Lightning calls what wraps its module with a method of its own",
                remedy="use a loop of your own, Accelerate or Hugging Face's Trainer",
            )
        modules = dict(pl_module.named_modules())
        if self.module not in modules:
            raise UnknownNameError("module", self.module, [name for name in modules if name])
        model = modules[self.module]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        (optimizer,) = trainer.optimizers
        run = Run(model, optimizer, self.config, directions=self.directions, grad_scaler=scaler)
        loaded, self._loaded = self._loaded, None
        self.begin(run, loaded)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the ids, and open a batch.

        Raises:
            CaptureError: If the batch has none, or the run's folder has another run.
        """
        if not isinstance(batch, dict):
            raise CaptureError(
                f"batches must be dictionaries, not {type(batch).__name__}",
                remedy="make samples dictionaries, and load with_ids(data) with IdCollator()",
            )
        assert self.run is not None
        try:
            self._batch.enter_context(self.run.batch(take_ids(batch)))
        except RunExistsError as error:
            remedy = "call trainer.fit(..., ckpt_path=...) with a checkpoint of it to go on with it"
            raise RunExistsError(error.path, remedy) from None

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Close the batch, before gradients are unscaled and clipped."""
        self._batch.close()
        self._measured = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log what the step credited, by direction, to the trainer's loggers."""
        pl_module.log_dict(self.credited())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the run."""
        self._inside.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the batch and the run, which end as where an exception comes out of a `with`."""
        unmeasured = self.run is not None and not self._measured
        mistaken = isinstance(exception, CaptureError) and not isinstance(exception, RunExistsError)
        if unmeasured and mistaken:
            exception.add_note(
                f"GhostLightning measures calls of {self.module or 'the LightningModule itself'}. "
                "Where training_step calls another module, such as self.net(...), name it: "
                "GhostLightning(..., module='net')"
            )
        for each in (self._batch, self._inside):
            each.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state, for a checkpoint of Lightning's."""
        return {} if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the run is made."""
        self._loaded = state_dict or None
