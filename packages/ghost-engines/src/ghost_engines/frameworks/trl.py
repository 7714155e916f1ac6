"""TRL's trainers, with a run inside."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from ghost_core import MissingExtraError
from ghost_engines.frameworks.trainer import GhostMixin

try:
    from trl import DPOTrainer, SFTTrainer
except ImportError as error:
    raise MissingExtraError("trl", "ghost-engines[trl]", "GhostSFTTrainer") from error


class GhostSFTTrainer(GhostMixin, SFTTrainer):  # type: ignore[misc] # has no types
    """TRL's `SFTTrainer` with in-run values: see `GhostCallback`.

    Where its fused head is trained, the head's backward pass runs once more for each sample. That
    is saved by a `compute_loss_func`, which has the model make logits, or by leaving the head out
    of what is measured.
    """

    compute_loss_func: Any

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; what TRL runs afterwards for its metrics is left alone."""
        own, run = self.compute_loss_func, self.ghost.run
        if own is None or run is None or not run.is_open:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with ExitStack() as afterwards:

            def loss_of(*given: Any, **named: Any) -> Tensor:
                loss: Tensor = own(*given, **named)
                afterwards.enter_context(run.evaluation())
                return loss

            self.compute_loss_func = loss_of
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                self.compute_loss_func = own


class GhostDPOTrainer(GhostMixin, DPOTrainer):  # type: ignore[misc] # has no types
    """TRL's `DPOTrainer` with in-run values: see `GhostCallback`.

    Each pair is a sample: the model runs on all that were chosen and then on all that were
    rejected, and both rows are the pair's.
    """

    row_owner: ClassVar[Mapping[str, str]] = {"*": "pair"}

    def owners_of(self, inputs: Mapping[str, Any], ids: Tensor) -> Mapping[str, Tensor]:
        """Return the pair of each row, `[2N]`."""
        return {"pair": torch.arange(len(ids)).repeat(2)}
