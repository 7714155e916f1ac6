"""Checks that a class known by name computes what its sampler was written for.

A library may change the code behind a name from one version to the next. So the first module of a
kind is compared with autograd on a tiny input before its sampler is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ghost_core import Call, GradientSampler
from ghost_core.algebra import full_precision
from ghost_core.tracking import dotted_name

Random = Callable[..., Tensor]
"""Makes normal numbers of the shape given, of the module's dtype and on its device."""

_ROUNDINGS = 8
"""Epsilons, relative to the largest entry, by which a gradient may be off."""

_CONFIGURATIONS = 64
"""How many configurations of one class are remembered."""

_findings: WeakKeyDictionary[type, dict[tuple[object, ...], str | None]] = WeakKeyDictionary()


class FormulaChecked(GradientSampler):
    """Mixed into a sampler, before its base: refuses modules whose formula is another one.

    The check runs once per class and configuration, on a shallow copy with random parameters: the
    module, its hooks and the global random numbers are left alone. Modules on the meta device
    have nothing to compute with and are not checked.
    """

    example_shape: ClassVar[tuple[int, ...]] = (2, 3)
    """Axes of the example in front of the features: two samples."""

    def refuse(self, module: nn.Module) -> str | None:
        """Refuse what the sampler's base refuses, then any other formula."""
        return super().refuse(module) or other_formula(self, module)

    def shrink(self, module: Any) -> None:
        """Cut the parameters of a copy down, where they are large; by default they stay."""

    def example(self, module: Any, random: Random) -> Tensor:
        """Return an input of two samples for the copy."""
        return random(*self.example_shape, *module.weight.shape)


def other_formula(sampler: FormulaChecked, module: nn.Module) -> str | None:
    """Say how a module differs from what its sampler was written for; None if it does not."""
    owned = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
    if not owned or any(parameter.is_meta for parameter in owned):
        return None
    known = _findings.setdefault(type(module), {})
    key = (type(sampler), *_configuration(module))
    if key not in known:
        if len(known) >= _CONFIGURATIONS:
            known.clear()
        known[key] = _compare(sampler, module)
    return known[key]


def _configuration(module: nn.Module) -> tuple[object, ...]:
    """Return what may change the code that a module runs: no sizes, no tensors."""
    parameters = {
        name: None if parameter is None else (parameter.dtype, parameter.device, parameter.dim())
        for name, parameter in module._parameters.items()
    }
    options = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | float | str | None) and name != "training"
    }
    # A method that holds its class would keep it from being forgotten; its code does not.
    code = getattr(type(module).forward, "__code__", None)
    return (code, *parameters.items(), *options.items())


def _compare(sampler: FormulaChecked, module: nn.Module) -> str | None:
    kind = dotted_name(type(module))
    try:
        error = _largest_error(sampler, module)
    except Exception as problem:
        reason = f"{type(problem).__name__} on a tiny input: {problem}"
    else:
        if error <= 1:
            return None
        reason = f"gradients on a tiny input differ from autograd's by {error:.0f} x the tolerance"
    return (
        f"{kind} does not compute the formula that {type(sampler).__name__} is written for "
        f"({reason}); use a version of its library where it does, exclude the layer, or register "
        "a sampler for a subclass of your own"
    )


def _largest_error(sampler: FormulaChecked, module: nn.Module) -> float:
    """Return by how much gradients are off, as a multiple of what rounding explains."""
    weight = next(module.parameters(recurse=False))
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(weight.device, weight.dtype)

    with torch.inference_mode(False), full_precision(weight.device):
        copied: Any = _small_copy(sampler, module, random)
        parameters = {name: p for name, p in copied._parameters.items() if p is not None}
        inputs = sampler.example(copied, random)
        if inputs.is_floating_point() and weight.dtype != torch.float16:
            # So small that the epsilon matters; float16 could not hold the squares.
            inputs[1] *= 1e-3
        with torch.enable_grad():
            output = type(module).forward(copied, inputs)
            samples = output.unbind()
        slope = random(*output.shape).to(output.dtype)
        expected = [
            torch.autograd.grad(sample, list(parameters.values()), its_slope, retain_graph=True)
            for sample, its_slope in zip(samples, slope, strict=True)
        ]
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        call = Call(dotted_name(type(module)), copied, (inputs,), {}, (output.detach(),), shapes)
        records = sampler.record(call)
        held = sampler.gradients(call.past(), records, [slope])
        # Even in float64, some of these layers compute in float32.
        epsilon = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        errors = [
            _error(held[name].materialize()[n], gradient, _ROUNDINGS * epsilon)
            for n, gradients in enumerate(expected)
            for name, gradient in zip(shapes, gradients, strict=True)
        ]
        return max(errors)


def _small_copy(sampler: FormulaChecked, module: nn.Module, random: Random) -> nn.Module:
    """Copy a module, with random parameters and with buffers of its own."""
    copied = copy.copy(module)
    copied._buffers = {
        name: None if buffer is None else buffer.detach().clone()
        for name, buffer in module._buffers.items()
    }
    copied._parameters = dict(module._parameters)
    sampler.shrink(copied)
    made: Any = {
        name: None if parameter is None else random(*parameter.shape).requires_grad_()
        for name, parameter in copied._parameters.items()
    }
    copied._parameters = made
    return copied


def _error(held: Tensor, expected: Tensor, tolerance: float) -> float:
    off = (held - expected.to(held.dtype)).abs().max().item()
    if off == 0:
        return 0
    scale = tolerance * expected.abs().max().item()
    # Neither a gradient that is not a number nor one where none belongs is explained by rounding.
    return off / scale if scale > 0 and math.isfinite(off / scale) else math.inf
