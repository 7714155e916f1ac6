"""The gradient of a validation batch, kept as the factors that it is a product of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghost_core import (
    CaptureError,
    Outer,
    Owned,
    Pass,
    PerSampleGradient,
    TrackedParameter,
    UnknownNameError,
)
from ghost_core.algebra import Lookups, Tokens, gram_of_uses
from ghost_core.arguments import whole
from ghost_core.capture import Listener, Recorder
from ghost_core.tracking import Tracking
from ghost_engines.directions.closures import Closure, ClosureSource

WAYS = ("cheaper", "factors", "built")

Uses = Sequence[Outer]
"""The factors of a direction for one parameter: the sum over all uses and their samples."""


@dataclass(frozen=True)
class FactoredDirection:
    """The gradient of a validation loss, kept as factors where these are smaller than it.

    The gradient of a layer's weight is `Σ_s grad[s] ⊗ input[s]` over the S tokens of all validation
    samples. Its dot with a training sample's gradient, of T tokens, is
    `Σ_t Σ_s ⟨grad_t, grad_s⟩ ⟨input_t, input_s⟩`, so that it need not be built.

        engine.add_direction("val", FactoredDirection(lambda: loss_fn(model, batch), samples=2))

    The numbers are those of the closure itself, up to rounding.

    Args:
        loss: A closure that returns the scalar loss whose gradient is the direction.
        samples: Number of validation samples M that it calls the model on.
        keep: "cheaper" keeps factors of those weights for which `S (d + p) < d p`, with d inputs
            and p outputs: they take less memory then, and less arithmetic in exact mode. "factors"
            keeps them wherever there are some, "built" nowhere. Biases and norms are always built.
        owners: As in `Engine.batch`, for the validation samples.

    Raises:
        CaptureError: If `loss` is no function, or there are no samples.
        UnknownNameError: If there is no such way to keep it.
    """

    loss: Closure
    samples: int
    keep: str = "cheaper"
    owners: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise CaptureError(
                f"FactoredDirection needs a function of nothing that returns a loss, not "
                f"{type(self.loss).__name__}"
            )
        whole("samples", self.samples, least=1)
        if self.keep not in WAYS:
            raise UnknownNameError("way to keep a direction", self.keep, WAYS)


class Factors(Listener):
    """Takes the gradients of a validation loss apart as they arrive.

    Args:
        tracking: What the engine tracks.
        verifies: Whether it is verified which rows are samples.
        source: What calls the loss.
        given: How the direction was given.

    Attributes:
        uses: The factors, by parameter name.
        sums: What was built, by the names of all other parameters.
    """

    balanced = False

    def __init__(
        self, tracking: Tracking, verifies: bool, source: ClosureSource, given: FactoredDirection
    ) -> None:
        self.tracking, self.verifies = tracking, verifies
        self._source, self._given = source, given
        self._expected = False
        self._copies: dict[object, tuple[Tensor, Tensor]] = {}
        self.uses: dict[str, list[Outer]] = {}
        self.sums: dict[str, Tensor] = {}

    def capture(self, recorder: Recorder) -> None:
        """Run the loss, forward and backward, and take what arrives.

        Raises:
            CaptureError: If a batch of another engine is open, or as a closure's loss may.
        """
        with (
            self._alone(recorder),
            recorder.capture(self, self._given.samples, self._given.owners),
            self._source.called() as result,
        ):
            loss, self._expected = self._source.loss_of(result), True
            loss.backward()
        self._copies.clear()
        if not self.uses and not self.sums:
            raise self._source.independent()
        for parameter in self.tracking.parameters:
            if parameter.name not in self.uses and parameter.name not in self.sums:
                self.sums[parameter.name] = torch.zeros(
                    parameter.shape, dtype=parameter.dtype, device=parameter.device
                )

    @contextmanager
    def _alone(self, recorder: Recorder) -> Iterator[None]:
        """Let the model serve nobody else."""
        with ExitStack() as stack:
            try:
                stack.enter_context(recorder.aside(self))
            except CaptureError as error:
                raise CaptureError(
                    f"direction {self._source.name!r}: a batch of another engine is open",
                    reason="factors are captured in a batch of their own, before the engine's",
                    remedy="open the batch of this engine first, or use keep='built'",
                ) from error
            yield

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Keep the factors, or add up what they make."""
        if not self._expected:
            raise self._source.backpropagated()
        name = parameter.name
        use = None if name in self.sums else _factors(gradient)
        kept = self.uses.get(name, [])
        if use is not None and self._is_worth([*kept, use]):
            self.uses[name] = [*kept, self._owned(use)]
            return
        total = torch.stack([each.sum() for each in (*kept, gradient)]).sum(0)
        self.uses.pop(name, None)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def _is_worth(self, uses: Uses) -> bool:
        if self._given.keep != "cheaper":
            return self._given.keep == "factors"
        return sum(map(_size, uses)) < uses[0].shape.numel()

    def _owned(self, use: Outer) -> Outer:
        """Return factors with memory of their own: what they are now, whatever is done to inputs.

        All samples become one, of all their tokens, where that needs no more than another shape.
        """
        tensors = {name: self._copy(each) for name, each in use.factor.tensors().items()}
        factor, grad = use.factor.replace(**tensors), use.grad.clone()
        if type(factor) in (Tokens, Lookups):
            flat = {name: each.flatten(0, 1).unsqueeze(0) for name, each in tensors.items()}
            factor, grad = factor.replace(**flat), grad.flatten(0, 1).unsqueeze(0)
        return Outer(factor, grad, use.shape)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Return a copy, the same for layers that see one input."""
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        if key not in self._copies:
            # With the tensor itself, whose memory would be given to another else.
            self._copies[key] = tensor, tensor.clone()
        return self._copies[key][1]


def _factors(gradient: PerSampleGradient) -> Outer | None:
    """Return factors whose products add up to the gradient of all samples, if it has some."""
    rows = gradient.rows if isinstance(gradient, Owned) else gradient
    return rows if type(rows) is Outer else None


def _size(use: Outer) -> int:
    """Return how many numbers factors are, inputs as the layer's weight meets them."""
    n, tokens, groups, p = use.grad.shape
    d = 1 if isinstance(use.factor, Lookups) else use.shape.numel() // (groups * p)
    return n * tokens * groups * (d + p)


def sum_of(uses: Uses) -> Tensor:
    """Return the direction itself, built."""
    return torch.stack([use.sum() for use in uses]).sum(0)


def squared_norm_of(uses: Uses) -> Tensor:
    """Return the squared norm of a direction, a scalar."""
    return gram_of_uses(uses, uses).sum().clamp(min=0)


def dots_with(uses: Uses, gradient: PerSampleGradient) -> Tensor:
    """Return the dots of per-sample gradients with a direction, `[N]`."""
    if isinstance(gradient, Owned):
        rows = dots_with(uses, gradient.rows)
        return rows.new_zeros(gradient.n).index_add_(0, gradient.owner, rows)
    return gram_of_uses([gradient], uses).sum(1)
