"""Scores candidates before a step: a pass of its own, which leaves no trace on the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ghost_core import CaptureError, Pass, PerSampleGradient, TrackedParameter
from ghost_core.batch import SampleIds, as_ids
from ghost_core.capture import Listener, Recorder
from ghost_core.compare import check_losses
from ghost_core.restoring import graphs_kept
from ghost_core.state import untouched
from ghost_core.tracking import Tracking
from ghost_engines.dot_sums import DotSums
from ghost_engines.held import HeldGradients
from ghost_engines.results import summed
from ghost_engines.selection.result import CandidateScores

Losses = Callable[[], Tensor]
"""Runs the model on the candidates, and returns one loss for each, floating `[N]`."""


class Candidates(Listener):
    """Multiplies the candidates' own gradients with directions, and with each other.

    Args:
        model: The model.
        recorder: The model's, which serves this.
        tracking: What the engine tracks.
        verifies: Whether the split by sample is verified.
        stacked: The directions by parameter name, `[K, *shape]`.
        directions: Their names.
    """

    balanced = False

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        tracking: Tracking,
        verifies: bool,
        stacked: Mapping[str, Tensor],
        directions: tuple[str, ...],
    ) -> None:
        self.tracking, self.verifies = tracking, verifies
        self._model, self._recorder = model, recorder
        self._stacked, self._directions = stacked, directions
        self._dots = DotSums({}, 0, 0)
        self._held: HeldGradients | None = None

    def score(
        self,
        losses: Losses,
        ids: SampleIds,
        *,
        gram: bool,
        scale: float,
        owners: Mapping[str, Tensor],
    ) -> CandidateScores:
        """Score candidates; see `ScoringEngine.score`.

        Args:
            losses: Runs the model on them.
            ids: Their ids, `[N]`.
            gram: Whether to multiply their gradients with each other.
            scale: What to multiply losses with, so that gradients of half precision do not vanish.
            owners: As in `Engine.batch`.
        """
        if not callable(losses):
            raise CaptureError(
                f"losses must be a function that runs the model, not a {type(losses).__name__}",
                reason="candidates are scored in a pass of their own",
                remedy="give lambda: per_sample_loss(model, batch)",
            )
        found = as_ids(ids)
        if not (n := len(found)):
            raise CaptureError("there are no candidates", remedy="give the ids of one or more")
        self._dots = DotSums(self._stacked, n, len(self._directions))
        self._held = HeldGradients(self.tracking.parameters) if gram else None
        try:
            with (
                untouched(self._model),
                graphs_kept(True),
                self._recorder.capture(self, n, owners) as capture,
            ):
                (_checked(losses(), n) * scale).sum().backward()
            products = None if self._held is None else summed(self._held.gram(n))
            return CandidateScores(
                ids=found,
                verified=self.verifies and not capture.doubt,
                by_parameter={key: dots / scale for key, dots in self._dots.total().items()},
                directions=self._directions,
                products=None if products is None else products / scale / scale,
            )
        finally:
            self._dots, self._held = DotSums({}, 0, 0), None

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Multiply with the directions, and hold the gradient where a Gram is asked for."""
        dots = gradient.dot(self._stacked[parameter.name])
        self._dots.add(parameter.name, pass_.samples, dots)
        if self._held is not None:
            self._held.add(pass_, parameter, gradient)


def _checked(losses: object, n: int) -> Tensor:
    """Return the losses of n candidates."""
    checked = check_losses(losses)
    if len(checked) != n:
        raise CaptureError(
            f"there are {len(checked)} losses for {n} candidates",
            remedy="return one loss per sample, [N], and give one id for each",
        )
    return checked
