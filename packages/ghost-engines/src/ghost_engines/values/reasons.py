"""Why a table of values is empty, or lacks a sample."""

from __future__ import annotations

from dataclasses import dataclass

from ghost_core import GhostError, UnknownNameError


@dataclass
class Counts:
    """What was seen of a run.

    Attributes:
        batches: Batches that were scored.
        skipped: Those whose gradients were thrown away before a step was made with them.
        steps: Steps of the optimizer that is followed.
        foreign: How often parameters changed while gradients waited for a step of it.
    """

    batches: int = 0
    skipped: int = 0
    steps: int = 0
    foreign: int = 0


def why_empty(counts: Counts, *, scaled: bool) -> str:
    """Return why nobody was credited.

    Args:
        counts: What was seen.
        scaled: Whether a scaler steps the optimizer, unless gradients are not finite.
    """
    if not counts.batches:
        return (
            "no batch was opened: put the forward and backward pass into `with engine.batch(ids)`"
        )
    if counts.foreign:
        return (
            "another optimizer stepped: parameters changed, and the optimizer that InRunValues was "
            f"given made {counts.steps} steps"
        )
    if not counts.steps:
        why = (
            "; the grad_scaler may have skipped its steps because gradients were not finite, "
            "after which scaler.get_scale() is less than before"
        )
        return (
            f"no step followed the {counts.batches} batches: the optimizer that InRunValues was "
            f"given did not step{why if scaled else ''}"
        )
    if not counts.skipped:
        return f"the {counts.batches} batches had no samples"
    return (
        f"batches were dropped: the gradients of {counts.skipped} of {counts.batches} were thrown "
        "away before a step was made with them"
    )


def why_partly(counts: Counts, waiting: int) -> str:
    """Return why some batches were credited to nobody; nothing if all were credited.

    Args:
        counts: What was seen.
        waiting: Batches that no step was made with yet.
    """
    found = []
    if counts.skipped:
        found.append(
            f"the gradients of {counts.skipped} of {counts.batches} batches were thrown away "
            "before a step was made with them"
        )
    if waiting:
        found.append(f"no step followed the last {waiting} of {counts.batches} batches")
    if found and counts.foreign:
        found.append(
            f"parameters changed {counts.foreign} times between a batch and its step, as by "
            "another optimizer"
        )
    return "; ".join(found)


class UnknownSampleError(UnknownNameError):
    """A sample that no step was made with.

    Args:
        sample: Its id.
        reason: Why it has no value.
        remedy: What to do about it, if anything.
    """

    def __init__(self, sample: object, reason: str, remedy: str = "") -> None:
        what = f"sample {sample!r} has no value"
        GhostError.__init__(self, what, reason=reason, remedy=remedy)
