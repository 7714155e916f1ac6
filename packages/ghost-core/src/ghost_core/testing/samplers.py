"""The conformance tests of gradient samplers: every operation against autograd, by sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core import GradientSampler, InputFactor, Record, Tokens, TrackedParameter
from ghost_core.algebra import PRECISIONS, matrix_shape
from ghost_core.errors import GhostError, UnbalancedError
from ghost_core.testing.examples import Draw, Inputs, LayerExample
from ghost_core.testing.holder import GradientHolder
from ghost_core.testing.losses import is_floating, losses_by_token
from ghost_core.testing.operations import (
    Gradients,
    check_operations,
    draw_projections,
    failing_as,
    project,
)
from ghost_core.testing.oracle import assert_within, norms, per_row, per_sample_gradients
from ghost_core.testing.repeated import Repeated, Siblings, leading_size, repeated
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
    _check_materialized(trial, n, tolerance, verify=True)
    _check_all_operations(trial, tolerance)
    _check_training_is_untouched(trial)
    _check_compressed(trial, tolerance)
    _check_tokens(replace(trial, example=once), tolerance)
    for name, alone in _one_by_one(example):
        label = f"with only {name} trainable"
        _check_materialized(replace(trial, example=alone, label=label), n, tolerance)
    _check_materialized(replace(trial, label="for one sample"), 1, tolerance)
    _check_no_sample(replace(trial, label="for no sample"))
    if dtype == torch.float64:
        for low, bound in REDUCED_PRECISION.items():
            _check_reduced(replace(trial, dtype=low, label=f"in {low}"), bound)
        cast = replace(trial, dtype=torch.float32, autocast=True, label="under bfloat16 autocast")
        _check_reduced(cast, REDUCED_PRECISION[torch.bfloat16])


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


def _one_by_one(example: LayerExample) -> Iterator[tuple[str, LayerExample]]:
    """Yield the example with one parameter trainable and all others frozen, for each in turn."""
    trainable = [name for name, p in example.build().named_parameters() if p.requires_grad]
    for name in trainable:
        others = (other for other in trainable if other != name)
        yield _local(name), replace(example, frozen=(*example.frozen, *others))


def _local(name: str) -> str:
    return name.removeprefix("layer.")


def _of(trial: Trial, name: str) -> str:
    """Name a parameter in a message."""
    return f"{trial.example.name}.{_local(name)} {trial.label}".rstrip()


def _captured(trial: Trial, n: int, *, verify: bool = False) -> dict[str, Gradients]:
    """Return what a sampler finds and what it should find, by parameter name."""
    try:
        with trial.engine(GradientHolder, verify=verify) as engine:
            found = trial.capture(engine, n)
    except UnbalancedError:  # whose cause the comparison with autograd shows in detail
        return _captured(trial, n)
    for name, gradients in found.items():
        _check_uses(engine.model, name, gradients.uses)
    return found


def _check_uses(model: nn.Module, name: str, arrived: Sequence[object]) -> None:
    assert isinstance(model, Repeated)
    if len(arrived) != model.uses:
        raise AssertionError(f"{name}: {len(arrived)} gradients arrived for {model.uses} uses")


def _check_all_operations(trial: Trial, tolerance: float) -> None:
    n = trial.example.n
    others = _captured(trial, max(1, n - 1))
    for name, gradients in _captured(trial, n).items():
        what = _of(trial, name)
        check_operations(gradients, others[name], dtype=trial.wide, tolerance=tolerance, what=what)


def _check_reduced(trial: Trial, tolerance: float) -> None:
    if trial.runs(trial.example.n):
        _check_all_operations(trial, tolerance)


def _check_materialized(trial: Trial, n: int, tolerance: float, *, verify: bool = False) -> None:
    for name, gradients in _captured(trial, n, verify=verify).items():
        what, expected = f"{_of(trial, name)}, materialize", gradients.expected
        if not expected.any():
            raise AssertionError(f"{what}: the reference is zero, so nothing would be tested")
        with failing_as(what):
            got = torch.stack([use.materialize() for use in gradients.uses]).sum(0)
        assert_within(got, expected, per_row(gradients.norms, expected), tolerance, what)


def _check_no_sample(trial: Trial) -> None:
    if not trial.runs(0):
        return
    for name, gradients in _captured(trial, 0).items():
        check_operations(gradients, gradients, dtype=trial.wide, what=_of(trial, name))


def _check_training_is_untouched(trial: Trial) -> None:
    n = trial.example.n
    module, inputs = trial.module(), trial.inputs(n)
    trial.losses(module, inputs).sum().backward()
    with trial.engine(GradientHolder, verify=False) as engine:
        trial.hold(engine, watched := trial.inputs(n))
    plain, found = _gradients(module, inputs), _gradients(engine.model, watched)
    for before, after in zip(plain, found, strict=True):
        same = before is after if before is None or after is None else torch.equal(before, after)
        if not same:
            raise AssertionError(
                f"{trial.example.name}: gradients of parameters or inputs differ from "
                "those of training without the sampler"
            )


def _gradients(module: nn.Module, inputs: Inputs) -> list[Tensor | None]:
    """Return `.grad` of the parameters and of the inputs."""
    leaves = [*module.parameters(), *filter(is_floating, tree_leaves(inputs[:2]))]
    return [leaf.grad for leaf in leaves]


def _check_tokens(trial: Trial, tolerance: float) -> None:
    """Compare dots by token with gradients of the losses at one position of the output alone."""
    n = trial.example.n
    module, inputs = trial.module(), trial.inputs(n)
    outputs = list(filter(is_floating, tree_leaves(module(*inputs.args, **inputs.kwargs))))
    # Features may be on the last axis or on the second, where there are others.
    plain = len(outputs) == 1 and outputs[0].dim() > 2 and len(outputs[0]) == n
    splits = list(losses_by_token(outputs[0])) if plain else []
    for name, gradients in _captured(trial, n).items():
        (use,) = gradients.uses
        direction = torch.randn(
            1, *use.shape, dtype=trial.wide, generator=Generator().manual_seed(3)
        )
        with torch.no_grad():
            dots = use.token_dot(direction)[:, :, 0]
        fitting = [losses for losses in splits if losses.shape == dots.shape]
        if dots.shape[1] == 1 or not fitting:
            continue
        expected = [_dots_by_token(module, name, losses, direction) for losses in fitting]
        scale = norms(gradients.expected)[:, None] * direction.norm()
        errors = [float((dots - each).abs().max()) for each in expected]
        closest = expected[errors.index(min(errors))]
        assert_within(dots, closest, scale, tolerance, f"{_of(trial, name)}, token_dot by token")


def _dots_by_token(model: nn.Module, name: str, losses: Tensor, direction: Tensor) -> Tensor:
    """Return the dots of the gradients of losses `[N, T]` with a direction, `[N, T]`."""
    dots = [
        per_sample_gradients(model, column, [name])[name].flatten(1) @ direction[0].flatten()
        for column in losses.unbind(1)
    ]
    return torch.stack(dots, dim=1)


def _check_compressed(trial: Trial, tolerance: float) -> None:
    generator, inputs = Generator().manual_seed(1), trial.inputs(trial.example.n)
    engine = trial.engine(_CompressingHolder, verify=False)
    engine.compressed = set()
    engine.maps = {
        parameter.name: draw_projections(parameter.shape, trial.wide, generator)
        for parameter in engine.parameters
    }
    expectations = trial.expected(engine.model, inputs)
    with engine:
        held = trial.hold(engine, inputs)
    for path, gradients in expectations.items():
        what = f"{_of(trial, path)}, project after compression"
        left, right = engine.maps[path]
        matrices = gradients.reshape(inputs.n, *matrix_shape(gradients.shape[1:]))
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
