"""A training batch and a validation batch that go through the model together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, Pass, PerSampleGradient, TrackedParameter
from ghost_core.algebra import accumulation_dtype
from ghost_core.ranks import Ranks
from ghost_core.tracking import Tracking
from ghost_engines.directions import Directions
from ghost_engines.dot_sums import DotSums
from ghost_engines.held import HeldGradients
from ghost_engines.modes.joining import Joiner, Padding, count_of
from ghost_engines.modes.together import Together

NAME = "validation"
"""The only direction: the gradient of the validation samples in the batch."""


class InBatch(Directions):
    """The direction that comes with each batch, instead of those that one adds."""

    def __init__(self, model: nn.Module, parameters: Iterable[TrackedParameter]) -> None:
        super().__init__(model, parameters)
        self._nothing = {
            each.name: torch.empty(0, dtype=accumulation_dtype(each.dtype), device=each.device)
            for each in self._parameters
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Its name."""
        return (NAME,)

    def add(self, name: str, *_: Any, **__: Any) -> NoReturn:
        """Refuse others.

        Raises:
            CaptureError: Always.
        """
        raise CaptureError(
            f"direction {name!r} cannot be added in concatenated mode",
            reason="samples are multiplied with the gradient of the validation samples that go "
            "through the model with them",
            remedy="give these to engine.concatenate(train, validation), or make the engine with "
            "mode='exact' or mode='fused'",
        )

    def __getitem__(self, name: str) -> NoReturn:
        """Refuse to give it: it is made and dropped layer by layer.

        Raises:
            CaptureError: Always.
        """
        raise CaptureError(
            f"there is no direction {name!r} to look at or remove in concatenated mode: what there "
            "is comes with each batch, and is dropped layer by layer"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return that there is nothing to remember."""
        return {NAME: {}}

    def renewed(self) -> dict[str, Tensor]:
        """Return what stands for it before the backward pass: of its dtype, and empty."""
        return dict(self._nothing)


class Concatenation:
    """What is known of the batch that is made of two.

    Args:
        tracking: What the engine tracks.
        ranks: The processes that train the model, over which the direction is averaged.

    Attributes:
        together: What keeps them together.
    """

    def __init__(self, tracking: Tracking, ranks: Ranks) -> None:
        self.together = Together(ranks, tracking.parameters)
        self._dim = tracking.batch_dim
        self._sizes: tuple[int, int] | None = None
        self._kept: dict[str, Tensor] = {}
        self._running = self._done = False

    def join(self, train: Any, validation: Any, pad: Padding) -> Any:
        """Return both batches as one, the training samples first."""
        n, m = count_of(train, self._dim, "training"), count_of(validation, self._dim, NAME)
        if not m:
            raise CaptureError("the validation batch has no samples")
        joined = Joiner(n, m, pad, self._dim).join(train, validation)
        self._sizes = n, m
        return joined

    def sizes(self, n: int) -> tuple[int, int]:
        """Return N and M, for a batch that was opened with n ids.

        Raises:
            CaptureError: If no batches were joined since the last, or another number of samples.
        """
        if self._sizes is None:
            raise CaptureError(
                "there is no validation batch: before engine.batch(ids), call "
                "engine.concatenate(train, validation) and call the model on what it returns"
            )
        if self._sizes[0] != n:
            raise CaptureError(
                f"engine.batch() got {n} ids for {self._sizes[0]} training samples: give one for "
                "each of them, and none for those of validation"
            )
        return self._sizes

    def weighted(
        self, losses: Tensor, train_weight: float | Tensor, validation_weight: float | Tensor
    ) -> Tensor:
        """Return the sum of all losses, each times its weight.

        Raises:
            CaptureError: If there is not one loss for each sample, or not one weight.
        """
        assert self._sizes is not None
        n, m = self._sizes
        if self._done:
            raise CaptureError("engine.backward() was called before in this batch, and goes once")
        if losses.shape != (n + m,) or not losses.is_floating_point():
            raise CaptureError(
                f"engine.backward() needs one loss for each of {n} training and {m} validation "
                f"samples, [{n + m}], not {losses.dtype} of shape {tuple(losses.shape)}",
                remedy="reduce losses over tokens, but not over samples (reduction='none')",
            )
        weights = torch.cat(
            [
                _weights(given, count, losses, name)
                for given, count, name in (
                    (train_weight, n, "train_weight"),
                    (validation_weight, m, "validation_weight"),
                )
            ]
        )
        return (losses * weights).sum()

    def run(self, loss: Tensor) -> None:
        """Backpropagate."""
        self._running = True
        try:
            self.together.backward(loss)
        finally:
            self._running, self._done = False, True

    def split(
        self, pass_: Pass, gradient: PerSampleGradient
    ) -> tuple[Pass, PerSampleGradient, Tensor]:
        """Return the part of the training samples, and the sum of the others' as a direction.

        Raises:
            CaptureError: If the gradient does not come from `run`, or the pass was on others.
        """
        assert self._sizes is not None
        n, m = self._sizes
        if not self._running:
            raise CaptureError(
                "in concatenated mode, call engine.backward(losses, train_weight=..., "
                "validation_weight=...) in place of loss.backward()"
            )
        if pass_.n != n + m:
            raise CaptureError(
                f"the model was called on {pass_.n} samples in a batch of {n} training and {m} "
                "validation samples: concatenate each micro-batch, and open a batch for it"
            )
        train = Pass(n, 0, several=pass_.several)
        direction = gradient.narrow(slice(n, None)).sum().contiguous().unsqueeze(0)
        return train, gradient.narrow(slice(0, n)), direction

    def averages(self, name: str, direction: Tensor) -> bool:
        """Average a direction over processes, in its memory, where all of them have come to it.

        Returns:
            Whether it is whole; if not, it is to be kept.
        """
        return self.together.averages(name, direction)

    def keep(self, name: str, direction: Tensor) -> None:
        """Keep a term of the direction until the others are there."""
        self._kept[name] = self._kept[name] + direction if name in self._kept else direction

    def finish(self, held: HeldGradients, dots: DotSums) -> dict[str, Tensor]:
        """Multiply what was held with what was kept, and let go of this.

        Returns:
            Squared norms of these directions by parameter name, `[1]`.
        """
        assert self._sizes is not None
        self._kept = self.together.rest(self._kept)
        for name, found in held.dot(self._kept, self._sizes[0]).items():
            dots.add(name, slice(0, self._sizes[0]), found)
        squared = {name: each.square().sum().unsqueeze(0) for name, each in self._kept.items()}
        self._kept.clear()
        return squared

    def close(self) -> None:
        """Forget the batch."""
        self._sizes = None
        self._kept.clear()
        self._done = False


def check_tracked(model: nn.Module, tracking: Tracking) -> None:
    """Refuse parameters whose gradients would be those of validation samples too.

    Raises:
        CaptureError: Naming them.
    """
    known = {alias for parameter in tracking.parameters for alias in parameter.aliases}
    untracked = [n for n, p in model.named_parameters() if p.requires_grad and n not in known]
    if untracked:
        named = ", ".join(untracked[:5]) + (", ..." if len(untracked) > 5 else "")
        raise CaptureError(
            f"concatenated mode has to make the gradients of all trainable parameters, and {named} "
            "are not selected",
            reason="autograd would add up those of the validation samples too",
            remedy="select them, freeze them, or use mode='exact' or mode='fused'",
        )


def _weights(given: float | Tensor, count: int, losses: Tensor, name: str) -> Tensor:
    """Return one weight for each of some samples."""
    if isinstance(given, int | float):  # copied from the host it would make the program wait
        return losses.new_full((count,), given)
    weights = torch.as_tensor(given, dtype=losses.dtype, device=losses.device).detach()
    if weights.shape not in ((), (count,)):
        raise CaptureError(
            f"{name} must be one number, or one for each of {count} samples, not of shape "
            f"{tuple(weights.shape)}"
        )
    return weights.expand(count)
