"""Models in half precision against the same weights in float64, and against their own autograd.

With u the unit roundoff, half the distance from one to the next number of the dtype:

* Every operation of a pass that returns half precision rounds once, by up to u, and R of them
  that are independent are off by √R u together. This is what becomes of the whole gradient
  however it is taken from the pass, so ghost's may be off by it, and hardly more than autograd's.
  Where a rounding decides on which side of a kink a number is, or which expert a token gets, only
  the comparison with autograd is left.
* Ghost multiplies what autograd multiplies, and keeps the result; autograd rounds it once more, by
  up to u, and the kernels of norms and biases may round each of the T partial sums, by √T u. The
  partial sums may be larger than their total, so twice as much is allowed.
* What ghost keeps is off from the exact product of the two only by float32's roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tests.zoo import FAMILIES, Case
from tests.zoo.compare import FLOAT32, held_gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghost_core.testing import assert_within, per_sample_gradients
from ghost_core.testing.oracle import norms, per_row

SMOOTH = ["gpt2", "llama", "bert", "vit", "convnext"]
KINKED = ["opt", "mixtral", "resnet"]
DTYPES = [torch.bfloat16, torch.float16]

NO_WORSE = 1.2
"""How far off ghost may be as a multiple of autograd: the last rounding, which is all that differs,
may go either way."""


class Roundings(TorchDispatchMode):
    """Counts operations that return numbers in half precision."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.count += not func.is_view and any(each.dtype in DTYPES for each in tensors)
        return result


def roundings(case: Case) -> int:
    """Return the number R of operations in half precision, there and back."""
    with Roundings() as mode:
        case.losses().sum().backward()
    case.model.zero_grad()
    return mode.count


def in_float64(case: Case) -> Case:
    """Return the same case with the same weights and inputs, in float64."""
    batch = {
        name: value.double() if value.is_floating_point() else value
        for name, value in case.batch.items()
    }
    return replace(case, model=case.model.double(), batch=batch)


def distance(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
    """Return the norms of the differences over all parameters, `[N]`."""
    assert gradients.keys() == others.keys()
    each = [norms(gradients[name].double() - others[name].double()) for name in gradients]
    return torch.stack(each).norm(dim=0)


def each_in(names):
    """Yield names and dtypes; the default tests have one in float16, which has more bits."""
    for name in names:
        for dtype in DTYPES:
            again = dtype == torch.float16 and name != "gpt2"
            yield pytest.param(name, dtype, marks=pytest.mark.stress if again else ())


@pytest.mark.parametrize(("name", "dtype"), [*each_in(SMOOTH + KINKED)])
def test_no_further_off_than_autograd(name, dtype):
    case = FAMILIES[name].case(4, dtype=dtype)
    unit = torch.finfo(dtype).eps / 2
    operations = roundings(case)
    rounded = per_sample_gradients(case.model, case.losses())
    held = held_gradients(case)

    for parameter, gradient in held.items():
        most = 2 * (1 + case.family.tokens**0.5) * unit * norms(gradient)
        assert (norms(gradient - rounded[parameter].double()) <= most).all(), parameter

    wide = in_float64(case)
    expected = per_sample_gradients(wide.model, wide.losses())
    error = distance(held, expected)
    assert (error <= NO_WORSE * distance(rounded, expected)).all()
    if name in SMOOTH:
        whole = torch.stack([norms(gradient) for gradient in expected.values()]).norm(dim=0)
        assert (error <= operations**0.5 * unit * whole).all()


def products(case: Case) -> dict[str, Tensor]:
    """Return what the pass multiplies for its layers, in float64: `[N, *shape]` by name.

    These are the linear layers and layer norms whose parameters are used nowhere else.
    """
    named = dict(case.model.named_parameters(remove_duplicate=False))
    aliases = list(named.values())
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in case.model.named_modules()
        if type(module) in FORMULAS and sum(module.weight is other for other in aliases) == 1
    ]
    losses = case.losses()
    for handle in handles:
        handle.remove()
    rows = [torch.autograd.grad(loss, list(outputs.values()), retain_graph=True) for loss in losses]
    found: dict[str, Tensor] = {}
    for name, *grads in zip(outputs, *rows, strict=True):
        grad = torch.stack([grad[sample] for sample, grad in enumerate(grads)]).double()
        x, grad = (values.reshape(case.n, -1, values.shape[-1]) for values in (inputs[name], grad))
        module = case.model.get_submodule(name)
        found[f"{name}.weight"] = FORMULAS[type(module)](module, x.double(), grad)
        if f"{name}.bias" in named:
            found[f"{name}.bias"] = grad.sum(1)
    return found


def of_linear(module: Any, x: Tensor, grad: Tensor) -> Tensor:
    return torch.einsum("ntp,ntd->npd", grad, x)


def of_conv1d(module: Any, x: Tensor, grad: Tensor) -> Tensor:
    return torch.einsum("ntp,ntd->ndp", grad, x)


def of_layer_norm(module: Any, x: Tensor, grad: Tensor) -> Tensor:
    return (grad * nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)).sum(1)


FORMULAS: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: of_linear,
    nn.LayerNorm: of_layer_norm,
    transformers.pytorch_utils.Conv1D: of_conv1d,
}
"""The weight's gradients `[N, *shape]` from inputs `[N, T, d]` and output gradients `[N, T, p]`."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_products_are_not_rounded(name, dtype):
    case = FAMILIES[name].case(4, dtype=dtype)
    held, expected = held_gradients(case), products(case)
    assert len(expected) > 12
    for parameter, product in expected.items():
        scale = per_row(norms(product), product)
        assert_within(held[parameter], product, scale, FLOAT32, parameter)
