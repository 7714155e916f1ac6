"""Hugging Face's Trainer, with a run inside."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ghost_core import CaptureError, MissingExtraError
from ghost_engines.frameworks.callback import GhostCallback
from ghost_engines.ids import ID_FIELD, take_ids
from ghost_engines.runs import RunExistsError

try:
    from transformers import Trainer
except ImportError as error:
    raise MissingExtraError("transformers", "ghost-engines[hf]", "GhostTrainer") from error


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
        try:
            with run.batch(ids, owners=self.owners_of(inputs, ids)):
                loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        except RunExistsError as error:
            remedy = "call trainer.train(resume_from_checkpoint=True) to go on with it"
            raise RunExistsError(error.path, remedy) from None
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
