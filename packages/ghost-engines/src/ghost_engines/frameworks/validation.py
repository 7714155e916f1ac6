"""The loss of a trainer's model on a data set, as a direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ghost_core import CaptureError
from ghost_core.state import random_state_kept
from ghost_engines.ids import ID_FIELD, with_ids


def loss_of(trainer: Any, name: str, given: Any) -> Callable[[], Tensor]:
    """Return the closure of a direction.

    Args:
        trainer: A trainer of transformers.
        name: The direction's name.
        given: A data set, of whose samples the model's own loss is taken in one batch, made by the
            trainer's collator; or the closure.

    Raises:
        CaptureError: If the collator makes no batch of the samples.
    """
    if callable(given):
        return given  # type: ignore[no-any-return]
    samples = [given[at] for at in range(len(given))]
    if samples and ID_FIELD not in samples[0]:
        numbered = with_ids(samples)
        samples = [numbered[at] for at in range(len(samples))]
    try:
        with random_state_kept():  # collators may draw
            batch = trainer.data_collator(samples)
    except (KeyError, TypeError, ValueError) as error:
        raise CaptureError(
            f"the trainer's collator makes no batch of the samples of direction {name!r}",
            reason=f"{_shown(samples)}: {type(error).__name__}: {error}",
            remedy="give samples as the collator gets them in training, where TRL has made tokens "
            "of texts, say; or a closure that returns a loss",
        ) from error
    inputs = {
        name: each.to(trainer.args.device) if isinstance(each, Tensor) else each
        for name, each in batch.items()
        if name != ID_FIELD
    }
    return partial(_model_loss, trainer, inputs)


def _shown(samples: Sequence[Any]) -> str:
    if samples and isinstance(samples[0], Mapping):
        return f"they have {', '.join(map(str, samples[0]))}"
    return f"they are of type {type(samples[0]).__name__}" if samples else "there are none"


def _model_loss(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    outputs = trainer.model(**inputs)
    loss: Tensor | None = getattr(outputs, "loss", None)
    if loss is None:
        raise CaptureError(
            f"{type(trainer.model).__name__} returns no loss of its own",
            remedy="give directions as closures that return a loss",
        )
    return loss
