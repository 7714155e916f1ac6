"""The conformance tests of gradient samplers: every operation against autograd, by sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ghost_core import GradientSampler
from ghost_core.algebra import PRECISIONS
from ghost_core.errors import GhostError, UnbalancedError
from ghost_core.testing.comparisons import (
    check_all_operations,
    check_compressed,
    check_materialized,
    check_no_sample,
    check_reduced,
    check_tokens,
    check_training_is_untouched,
    one_by_one,
)
from ghost_core.testing.examples import Draw, LayerExample
from ghost_core.testing.operations import check_operations
from ghost_core.testing.promises import check_promises
from ghost_core.testing.repeated import Siblings, leading_size, repeated
from ghost_core.testing.trials import Trial, capture
from ghost_core.tracking import Claim, SamplerRegistry, dotted_name

REDUCED_PRECISION = {
    dtype: PRECISIONS[dtype].tolerance for dtype in (torch.float32, torch.bfloat16)
}
"""Error allowed in reduced precision against float64, relative to the norms of what is multiplied.

It includes what the layer's own forward and backward pass lose, hence so much more than the
rounding of one number.
"""


def check_sampler(
    sampler: GradientSampler | type[GradientSampler],
    module: nn.Module,
    *args: Any,
    uses: int = 1,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    n: int | None = None,
    **kwargs: Any,
) -> None:
    """Assert that a sampler agrees with autograd, run sample by sample in float64.

    A small model calls the module on the inputs, and a nonlinear loss with random weights for
    every output element is taken. Then these are compared, parameter by parameter:

    * `materialize`, `dot`, `token_dot`, `sum`, `narrow`, `paired`, `gram` and `project` of the
      per-sample gradients, with all cross terms between uses;
    * `token_dot` token by token, where tokens are positions of the output;
    * projections of what was compressed in the forward pass;
    * what is kept: no tensor that depends on inputs in `static`, and under autocast inputs as the
      kernel saw them;
    * calls with all inputs by keyword; and with several tokens a sample, where one was given and
      the module runs on more;
    * each parameter while all others are frozen; one sample; no sample (shapes only, and where
      the module itself runs on none);
    * `.grad` and the gradients of the inputs, which must be bit-identical to those of plain
      training;
    * all operations again in float32, in bfloat16 and in float32 under bfloat16 autocast, where
      the module runs in these, to the looser bounds of `REDUCED_PRECISION`.

    The module is copied; neither it nor its gradients are touched. The global random number
    generators are left as they are.

    Args:
        sampler: The sampler or its class. Samplers are stateless: the class is what counts.
        module: The layer, of the very class that the sampler handles.
        args: Positional inputs, samples on axis 0. Floating ones require gradients.
        uses: How often the model calls the module in a pass, on differently transformed inputs.
        dtype: Dtype of the main comparison; with others than float64 it is the only one.
        tolerance: Error allowed in it, relative to the norms of what is multiplied.
        n: Number of samples N, at least 2; by default the leading size of the first input.
        kwargs: Keyword inputs.

    Raises:
        AssertionError: Naming parameter, operation, worst entry, error and bound.
        UnsupportedLayerError: If the sampler refuses the module.
        WrongSplitError: If the module mixes samples.
        ValueError: If the inputs do not make up two samples.
    """
    kind = sampler if isinstance(sampler, type) else type(sampler)
    if n is None:
        n = leading_size((args, kwargs))
    if n < 2:
        raise ValueError(f"give at least two samples, not {n}")
    claim = Claim(dotted_name(type(module)), kind, "ghost_core.testing")
    registry = SamplerRegistry([claim])
    once, example = (repeated(module, (args, kwargs), n, each) for each in (1, uses))
    trial = Trial(example, registry, dtype, blamed=kind.__name__)
    check_materialized(trial, n, tolerance, verify=True)
    check_all_operations(trial, tolerance)
    check_training_is_untouched(trial)
    check_compressed(trial, tolerance)
    check_tokens(replace(trial, example=once), tolerance)
    for name, alone in one_by_one(example):
        label = f"with only {name} trainable"
        check_materialized(replace(trial, example=alone, label=label), n, tolerance)
    check_materialized(replace(trial, label="for one sample"), 1, tolerance)
    check_no_sample(replace(trial, label="for no sample"))
    if dtype == torch.float64:
        check_promises(replace(trial, example=once), module, (args, kwargs), tolerance)
        for low, bound in REDUCED_PRECISION.items():
            check_reduced(replace(trial, dtype=low, label=f"in {low}"), bound)
        cast = replace(trial, dtype=torch.float32, autocast=True, label="under bfloat16 autocast")
        check_reduced(cast, REDUCED_PRECISION[torch.bfloat16])


def check_layer(
    sampler: type[GradientSampler],
    make: Callable[[], nn.Module],
    *inputs: tuple[Draw, ...],
    n: int = 4,
) -> None:
    """Run `check_sampler` on inputs of several shapes, for one use and two, and on tied layers.

    For a linear layer, with as many tokens as samples in the last:

        check_layer(LinearSampler, lambda: nn.Linear(6, 7), (normal(N, 6),), (normal(N, N, 6),))

    Args:
        sampler: The sampler's class.
        make: Makes the layer, of the very class that the sampler handles.
        inputs: Draws of the positional inputs, samples on axis 0; see `normal` and `indices`.
        n: Number of samples N.

    Raises:
        AssertionError: Naming parameter, operation, worst entry, error and bound.
        GhostError: If the layer or a call is refused.
    """
    claim = Claim(dotted_name(type(make())), sampler, "ghost_core.testing")
    for draws in inputs:
        example = LayerExample("layer", make, draws, n=n)
        for uses in (1, 2):
            check_sampler(sampler, example.build(), *example.draw().args, uses=uses)
        for name, _ in make().named_parameters(recurse=False):
            tied = replace(
                example, name=f"layers with one {name}", make=partial(Siblings, make, name)
            )
            check_example(tied, registry=SamplerRegistry([claim]))


def check_example(
    example: LayerExample,
    *,
    registry: SamplerRegistry | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Assert that ghost is exact on an example, or refuses it with the reason expected.

    Every operation on the per-sample gradients of every trainable parameter is compared with
    autograd, run sample by sample in float64; Grams also with a batch of one sample fewer. The
    split by sample is verified in both.

    Args:
        example: An example, such as one of `LAYERS`.
        registry: Where samplers are found; by default those of all installed plugins.
        tolerance: Error allowed relative to the norms of what is multiplied.

    Raises:
        AssertionError: Naming example, parameter, operation, worst entry, error and bound; or
            that the example was not refused, or for another reason.
        GhostError: If it was refused and should not be.
    """
    if example.refusal is not None:
        _check_refused(example, registry)
        return
    sizes = [example.n, max(1, example.n - 1)]
    try:
        first, second = capture(example, sizes, registry)
    except UnbalancedError:  # whose cause the comparison with autograd shows in detail
        first, second = capture(example, sizes, registry, verify=False)
    for name, gradients in first.items():
        what = f"{example.name}, {name}"
        if not gradients.expected.any():
            raise AssertionError(f"{what}: the reference is zero, so nothing would be tested")
        check_operations(gradients, second[name], tolerance=tolerance, what=what)


def _check_refused(example: LayerExample, registry: SamplerRegistry | None) -> None:
    assert example.refusal is not None
    try:
        capture(example, [example.n], registry)
    except GhostError as error:
        if not re.search(example.refusal, str(error)):
            raise AssertionError(
                f"{example.name} was refused for another reason than {example.refusal!r}: {error}"
            ) from error
    else:
        raise AssertionError(f"{example.name} was not refused: {example.refusal!r} was expected")
