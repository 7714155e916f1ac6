"""The conformance tests of gradient samplers: every operation against autograd, by sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ghost_core import GradientSampler, InputFactor, Record, Tokens, TrackedParameter
from ghost_core.algebra import PRECISIONS, matrix_shape
from ghost_core.errors import GhostError, UnbalancedError
from ghost_core.testing.examples import Draw, LayerExample, capture
from ghost_core.testing.holder import GradientHolder
from ghost_core.testing.layer_case import LayerCase, LayerRun, leading_size
from ghost_core.testing.operations import check_operations, draw_projections, failing_as, project
from ghost_core.testing.oracle import assert_within, norms, per_row, per_sample_gradients
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
    names = tuple(
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    )
    case = LayerCase(kind, module, (args, kwargs), n, uses, names).cast(dtype)
    _check_materialized(case, tolerance, verify=True)
    _check_all_operations(case, tolerance)
    _check_training_is_untouched(case)
    _check_compressed(case, tolerance)
    _check_tokens(replace(case, uses=1), tolerance)
    for name in names:
        alone = replace(case, names=(name,), label=f"with only {name} trainable")
        _check_materialized(alone, tolerance)
    _check_materialized(case.take(slice(0, 1), "for one sample"), tolerance)
    _check_no_sample(case.take(slice(0, 0), "for no sample"))
    if dtype == torch.float64:
        for low, bound in REDUCED_PRECISION.items():
            _check_reduced(case.cast(low, f"in {low}"), bound)
        rounded = case.cast(torch.bfloat16).cast(torch.float32, "under bfloat16 autocast")
        _check_reduced(replace(rounded, autocast=True), REDUCED_PRECISION[torch.bfloat16])


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
                example, name=f"layers with one {name}", make=partial(_Siblings, make, name)
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


class _CompressingHolder(GradientHolder):
    """Compresses the input side in the forward pass, as a projection engine does."""

    maps: dict[str, tuple[Tensor, Tensor]]
    compressed: set[str]

    def on_input(self, parameter: TrackedParameter, record: Record) -> Record:
        if not isinstance(record, InputFactor):
            return record
        self.compressed.add(parameter.name)
        left, right = self.maps[parameter.name]
        seen = left if record.transposed else right
        mixed = record.mix(seen.expand(record.groups, *seen.shape))
        return Tokens(mixed, record.transposed)


def _check_all_operations(case: LayerCase, tolerance: float) -> None:
    others = case.another_batch().capture()
    for name, gradients in case.capture().items():
        what = case.of(name)
        check_operations(gradients, others[name], dtype=case.wide, tolerance=tolerance, what=what)


def _check_reduced(case: LayerCase, tolerance: float) -> None:
    if case.runs():
        _check_all_operations(case, tolerance)


def _check_materialized(case: LayerCase, tolerance: float, *, verify: bool = False) -> None:
    for name, gradients in case.capture(verify=verify).items():
        what, expected = f"{case.of(name)}, materialize", gradients.expected
        if not expected.any():
            raise AssertionError(f"{what}: the reference is zero, so nothing would be tested")
        with failing_as(what):
            got = torch.stack([use.materialize() for use in gradients.uses]).sum(0)
        assert_within(got, expected, per_row(gradients.norms, expected), tolerance, what)


def _check_no_sample(case: LayerCase) -> None:
    if not case.runs():
        return
    for name, gradients in case.capture().items():
        check_operations(gradients, gradients, dtype=case.wide, what=case.of(name))


def _check_training_is_untouched(case: LayerCase) -> None:
    plain, watched = case.run(), case.run()
    plain.losses().sum().backward()
    case.hold(watched, case.engine(GradientHolder, watched.model, verify=False))
    for before, after in zip(plain.gradients(), watched.gradients(), strict=True):
        same = before is after if before is None or after is None else torch.equal(before, after)
        if not same:
            raise AssertionError(
                f"{type(case.module).__name__}: gradients of parameters or inputs differ from "
                "those of training without the sampler"
            )


def _check_tokens(case: LayerCase, tolerance: float) -> None:
    """Compare dots by token with gradients of the losses at one position of the output alone."""
    run = case.run()
    splits = list(run.losses_by_token())
    for name, gradients in case.capture().items():
        (use,) = gradients.uses
        direction = torch.randn(
            1, *use.shape, dtype=case.wide, generator=Generator().manual_seed(3)
        )
        with torch.no_grad():
            dots = use.token_dot(direction)[:, :, 0]
        fitting = [losses for losses in splits if losses.shape == dots.shape]
        if dots.shape[1] == 1 or not fitting:
            continue
        expected = [_dots_by_token(run, name, losses, direction) for losses in fitting]
        scale = norms(gradients.expected)[:, None] * direction.norm()
        errors = [float((dots - each).abs().max()) for each in expected]
        closest = expected[errors.index(min(errors))]
        assert_within(dots, closest, scale, tolerance, f"{case.of(name)}, token_dot by token")


def _dots_by_token(run: LayerRun, name: str, losses: Tensor, direction: Tensor) -> Tensor:
    """Return the dots of the gradients of losses `[N, T]` with a direction, `[N, T]`."""
    parameter = f"layer.{name}"
    dots = [
        per_sample_gradients(run.model, column, [parameter])[parameter].flatten(1)
        @ direction[0].flatten()
        for column in losses.unbind(1)
    ]
    return torch.stack(dots, dim=1)


def _check_compressed(case: LayerCase, tolerance: float) -> None:
    run, generator = case.run(), Generator().manual_seed(1)
    engine = case.engine(_CompressingHolder, run.model, verify=False)
    engine.compressed = set()
    engine.maps = {
        parameter.name: draw_projections(parameter.shape, case.wide, generator)
        for parameter in engine.parameters
    }
    held = case.hold(run, engine)
    for name, gradients in case.oracle().items():
        path, what = f"layer.{name}", f"{case.of(name)}, project after compression"
        left, right = engine.maps[path]
        matrices = gradients.reshape(case.n, *matrix_shape(gradients.shape[1:]))
        expected, scale = project(matrices, norms(gradients), left, right)
        got = []
        for use in held.gradients(path):
            done = path in engine.compressed
            transposed = getattr(getattr(use, "factor", None), "transposed", False)
            remaining = (
                None if done and transposed else left,
                None if done and not transposed else right,
            )
            with failing_as(what), torch.no_grad():
                got.append(use.project(*remaining))
        assert_within(torch.stack(got).sum(0), expected, scale, tolerance, what)


class _Siblings(nn.Module):
    """Calls two layers, which have one parameter in common, on the same inputs."""

    def __init__(self, make: Callable[[], nn.Module], name: str) -> None:
        super().__init__()
        self.first, self.second = make(), make()
        setattr(self.second, name, getattr(self.first, name))

    def forward(self, *inputs: Any) -> tuple[Any, Any]:
        """Return both outputs."""
        return self.first(*inputs), self.second(*inputs)


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
