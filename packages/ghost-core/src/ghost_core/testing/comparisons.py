"""The comparisons with autograd that the conformance test of samplers is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core import InputFactor, Outer, Record, TrackedParameter
from ghost_core.algebra import matrix_shape
from ghost_core.errors import UnbalancedError
from ghost_core.testing.examples import Inputs, LayerExample
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
from ghost_core.testing.repeated import Repeated
from ghost_core.testing.trials import Trial


class _CompressingHolder(GradientHolder):
    """Compresses the input side in the forward pass, as a projection engine does."""

    maps: dict[str, tuple[Tensor, Tensor]]
    what: str
    compressed: set[str]

    def on_input(self, parameter: TrackedParameter, record: Record) -> Record:
        if not isinstance(record, InputFactor):
            return record
        left, right = self.maps[parameter.name]
        compressed = record.compress(left if record.transposed else right)
        if not compressed.compressed:
            name = f"{self.what}.{_local(parameter.name)}"
            raise AssertionError(
                f"{name}, compress: what {type(record).__name__} returns does not say that it is "
                "compressed, so it would be once more"
            )
        self.compressed.add(parameter.name)
        return compressed


def one_by_one(example: LayerExample) -> Iterator[tuple[str, LayerExample]]:
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


def captured(trial: Trial, n: int, *, verify: bool = False) -> dict[str, Gradients]:
    """Return what a sampler finds and what it should find, by parameter name."""
    try:
        with trial.engine(GradientHolder, verify=verify) as engine:
            found = trial.capture(engine, n)
    except UnbalancedError:  # whose cause the comparison with autograd shows in detail
        return captured(trial, n)
    for name, gradients in found.items():
        _check_uses(engine.model, name, gradients.uses)
    return found


def _check_uses(model: nn.Module, name: str, arrived: Sequence[object]) -> None:
    assert isinstance(model, Repeated)
    if len(arrived) != model.uses:
        raise AssertionError(f"{name}: {len(arrived)} gradients arrived for {model.uses} uses")


def check_all_operations(trial: Trial, tolerance: float) -> None:
    """Compare every operation on the gradients of a batch, and Grams with those of another."""
    n = trial.example.n
    others = captured(trial, max(1, n - 1))
    for name, gradients in captured(trial, n).items():
        what = _of(trial, name)
        check_operations(gradients, others[name], dtype=trial.wide, tolerance=tolerance, what=what)


def check_reduced(trial: Trial, tolerance: float) -> None:
    """Compare every operation where the module runs in the dtype."""
    if trial.runs(trial.example.n):
        check_all_operations(trial, tolerance)


def check_materialized(trial: Trial, n: int, tolerance: float, *, verify: bool = False) -> None:
    """Compare the gradients themselves."""
    for name, gradients in captured(trial, n, verify=verify).items():
        what, expected = f"{_of(trial, name)}, materialize", gradients.expected
        if not expected.any():
            raise AssertionError(f"{what}: the reference is zero, so nothing would be tested")
        with failing_as(what):
            got = torch.stack([use.materialize() for use in gradients.uses]).sum(0)
        assert_within(got, expected, per_row(gradients.norms, expected), tolerance, what)


def check_no_sample(trial: Trial) -> None:
    """Compare shapes and dtypes for an empty batch, where the module runs on one."""
    if not trial.runs(0):
        return
    for name, gradients in captured(trial, 0).items():
        check_operations(gradients, gradients, dtype=trial.wide, what=_of(trial, name))


def check_training_is_untouched(trial: Trial) -> None:
    """Assert that `.grad` of parameters and inputs are bit-identical to plain training's."""
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


def check_tokens(trial: Trial, tolerance: float) -> None:
    """Compare dots by token with gradients of the losses at one position of the output alone."""
    n = trial.example.n
    module, inputs = trial.module(), trial.inputs(n)
    outputs = list(filter(is_floating, tree_leaves(module(*inputs.args, **inputs.kwargs))))
    # Features may be on the last axis or on the second, where there are others.
    plain = len(outputs) == 1 and outputs[0].dim() > 2 and len(outputs[0]) == n
    splits = list(losses_by_token(outputs[0])) if plain else []
    for name, gradients in captured(trial, n).items():
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


def check_compressed(trial: Trial, tolerance: float) -> None:
    """Compare projections of what was compressed in the forward pass."""
    generator, inputs = Generator().manual_seed(1), trial.inputs(trial.example.n)
    engine = trial.engine(_CompressingHolder, verify=False)
    engine.what, engine.compressed = trial.example.name, set()
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
            if path in engine.compressed and not (isinstance(use, Outer) and use.factor.compressed):
                raise AssertionError(f"{what}: the gradient is of inputs that are not compressed")
            with failing_as(what), torch.no_grad():
                got.append(use.project(left, right))
        assert_within(torch.stack(got).sum(0), expected, scale, tolerance, what)
