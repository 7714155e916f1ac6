"""Compares ghost's gradients with one autograd call per sample, on the user's own batch.

The verification of the split looks at which rows a gradient reaches. It cannot see a loss that
couples samples, or a sampler with a wrong formula; this looks at values and can.

1. Without ghost, the losses `[N]` are computed, and autograd is asked for the gradient of some of
   them, one call each.
2. They are computed again in a batch of ghost's, and `Σ_n w_n losses[n]` is backpropagated. What
   arrives for row n is to be `w_n` times the gradient of `losses[n]`.

The weights differ, so that identical samples that share a loss or exchange rows are found as well.
They are powers of two, which scale numbers without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ghost_core.algebra import chunks
from ghost_core.arguments import whole
from ghost_core.compare.computation import Computation, Losses
from ghost_core.compare.diagnosis import diagnose
from ghost_core.compare.report import Comparison, check_parameters
from ghost_core.errors import CaptureError
from ghost_core.plugins import select
from ghost_core.tracking import Selection

_ELEMENTS = 2**28  # 2 GiB of float64


def compare(
    model: nn.Module,
    losses: Losses,
    selection: Selection | None = None,
    *,
    verify: bool = True,
    samples: int = 8,
    tolerance: float | None = None,
    owners: Mapping[str, Tensor] = MappingProxyType({}),
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """Compare ghost's gradients of some samples with one autograd call per sample.

    `losses` is called a few times, always with the same random numbers and buffers. `.grad`,
    random number generators, buffers, modes, `requires_grad` and hooks are as found afterwards.
    Parameters are frozen in ghost's own pass, so that no hook on their gradients runs, unless an
    engine is attached for training. One graph and the gradients of a few samples are held at a
    time: of as many as fit into 2 GiB of float64, or of one.

    Args:
        model: The module that `losses` calls.
        losses: Runs the model on a batch and returns one loss per sample, floating `[N]`.
        selection: What to track, and how: see `ghost_core.plugins.select`; by default all.
        verify: Whether to verify the split by sample; without, samples that mix are not refused
            but found in the values.
        samples: How many samples to compare, spread over the batch, first and last included.
        tolerance: Error allowed, between 0 and 1; by default that of `Precision.of` their dtypes.
        owners: Tensors that the option `row_owner` names, as `Engine.batch` takes them.
        progress: Called with 1 after each sample.

    Returns:
        The errors by parameter.

    Raises:
        CaptureError: If an option does not fit, a batch is open, or the losses are not `[N]`,
            finite, dependent on the tracked parameters, and the same each time.
        WrongSplitError: If the split by sample is refused.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
    """
    if not callable(losses):
        raise CaptureError(
            f"verify() takes a function that computes the losses, not a {type(losses).__name__}: "
            "engine.verify(lambda: per_sample_loss(model, batch))"
        )
    if tolerance is not None and not 0 < tolerance < 1:
        raise CaptureError(f"tolerance must be between 0 and 1, not {tolerance}")
    asked = select() if selection is None else selection
    computed = Computation(model, losses, asked, verify, owners)
    with computed.attached():
        n = len(computed.expected)
        chosen, weights = choose_samples(n, samples), _weights(n)
        verified, remainders = True, []
        elements = sum(map(Tensor.numel, computed.parameters.values()))
        for part in chunks(len(chosen), elements, _ELEMENTS):
            remainder = computed.differentiate(chosen[part], progress)
            verified &= computed.backpropagate(weights, partial(remainder.subtract, weights))
            remainders.append(remainder)
        checks = check_parameters(remainders, computed.tracking.modules, computed.dtypes, tolerance)
        found = Comparison(n, chosen, checks, verified)
        if found.ok:
            return found
        reason, remedy = diagnose(computed, found)
        return replace(found, reason=reason, remedy=remedy)


def choose_samples(n: int, samples: int) -> tuple[int, ...]:
    """Return the positions of some of N samples, spread evenly, first and last included.

    Raises:
        CaptureError: If `samples` is not positive.
    """
    count = min(whole("samples", samples, least=1), n)
    return tuple(round(at * (n - 1) / max(count - 1, 1)) for at in range(count))


def _weights(n: int) -> Tensor:
    """Draw a weight for each loss: powers of two, from no global random number generator."""
    generator = torch.Generator().manual_seed(0)
    return 2.0 ** torch.randint(-2, 2, (n,), generator=generator)
