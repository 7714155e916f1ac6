"""Every layer of the public table on a device: its gradients there, and what engines make of them.

On the CPU only a few run, to show that the tests themselves work: all layers have tests of their
own there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghost_core import GhostError
from ghost_core.testing import (
    LAYERS,
    GradientHolder,
    LayerExample,
    assert_within,
    per_sample_gradients,
)
from ghost_core.testing.examples import Inputs, losses
from ghost_core.testing.oracle import norms, per_row
from ghost_engines import DotProductEngine, ProjectionEngine, Scores

FEW = ["linear", "conv2d", "embedding", "layer norm", "multi-head attention", "lstm"]
EVERYWHERE = os.environ.get("GHOST_TEST_DEVICE", "cpu") != "cpu"
EXACT = 1e-9  # relative to norms, in float64
NAMES = [*LAYERS] if EVERYWHERE else [name for name in LAYERS if name in FEW]


def is_divisible(name: str) -> bool:
    """Tell whether an example has a sample to train on beside one of validation."""
    return LAYERS[name].refusal is None and LAYERS[name].n > 1


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@dataclass(frozen=True)
class OnDevice:
    """An example's module and inputs on a device."""

    example: LayerExample
    module: nn.Module
    inputs: Inputs

    @classmethod
    def of(cls, name: str, device: torch.device) -> OnDevice:
        """Build an example, and move it."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # As leaves of a graph: where modules are computed again, torch asks for one.
            return value.to(device).requires_grad_(value.is_floating_point())

        example = LAYERS[name]
        drawn = example.draw()
        inputs = drawn._replace(
            args=tree_map(moved, drawn.args), kwargs=tree_map(moved, drawn.kwargs)
        )
        return cls(example, example.build().to(device), inputs)

    def losses(self, module: nn.Module) -> Tensor:
        """Run the module, and return the losses `[N]`."""
        return losses(self.example, module, self.inputs)

    def expected(self) -> dict[str, Tensor]:
        """Return each sample's gradients by autograd, `[N, *shape]` by name."""
        module = copy.deepcopy(self.module)
        return per_sample_gradients(module, self.losses(module))

    def found(self, engine: Any) -> Any:
        """Return what an engine makes of a batch."""
        with engine, engine.batch(range(self.inputs.n)) as batch:
            self.losses(engine.model).sum().backward()
        return batch.result


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_exact_or_refused(name: str, device: torch.device) -> None:
    case = OnDevice.of(name, device)
    if case.example.refusal is not None:
        with pytest.raises(GhostError, match=case.example.refusal):
            case.found(GradientHolder(case.module, **case.example.options))
        return
    expected = case.expected()
    held = case.found(GradientHolder(case.module, **case.example.options)).materialize()
    assert held.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert held[parameter].device.type == device.type
        scale = per_row(norms(gradient), gradient)
        assert_within(held[parameter], gradient, scale, EXACT, parameter)


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("name", [name for name in NAMES if LAYERS[name].refusal is None])
def test_dots_and_norms_are_exact(name: str, mode: str, device: torch.device) -> None:
    case = OnDevice.of(name, device)
    expected, options = case.expected(), case.example.options
    generator = torch.Generator().manual_seed(0)
    direction = {
        key: torch.randn(each.shape[1:], dtype=each.dtype, generator=generator).to(device)
        for key, each in expected.items()
    }
    engine = DotProductEngine(case.module, mode=mode, norms=True, **options)
    engine.add_direction("random", direction)
    check_scores(case, case.found(engine), expected, direction)


@pytest.mark.parametrize("name", [each for each in NAMES if is_divisible(each)])
def test_concatenated_dots_and_norms_are_exact(name: str, device: torch.device) -> None:
    """The last sample is of validation."""
    case = OnDevice.of(name, device)
    expected, n = case.expected(), case.inputs.n - 1
    train = {key: each[:n] for key, each in expected.items()}
    direction = {key: each[n] for key, each in expected.items()}
    engine = DotProductEngine(case.module, mode="concatenated", norms=True, **case.example.options)
    engine.concatenate(torch.zeros(n, n, n), torch.zeros(1, 1, 1), pad=0)  # joined already
    with engine, engine.batch(range(n)) as batch:
        engine.backward(case.losses(case.module), train_weight=1, validation_weight=1)
    check_scores(case, batch.result, train, direction)


def check_scores(
    case: OnDevice, found: Scores, expected: dict[str, Tensor], direction: dict[str, Tensor]
) -> None:
    """Assert that dots, norms and `.grad` are those of gradients `[N, *shape]` by name."""
    dots = sum(
        each.reshape(len(each), -1) @ direction[key].flatten() for key, each in expected.items()
    )
    sizes = torch.stack([norms(each) for each in expected.values()]).norm(dim=0)
    scale = sizes * torch.stack([each.norm() for each in direction.values()]).norm()
    assert_within(found.total[:, 0], dots, scale, EXACT, "dots")
    assert_within(found.norms, sizes, sizes, EXACT, "norms")
    for key, each in expected.items():
        made = case.module.get_parameter(key).grad
        assert made is not None
        off = torch.linalg.vector_norm(made.to_dense() - each.sum(0))
        assert off <= EXACT * norms(each).sum(), f"the gradient of {key}"


@pytest.mark.parametrize("name", [name for name in NAMES if LAYERS[name].refusal is None])
def test_projections_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    def rows(where: torch.device, make: Callable[..., Any] = ProjectionEngine) -> Tensor:
        case = OnDevice.of(name, where)
        found = case.found(make(case.module, dim=4, min_dim=2, **case.example.options))
        kept: Tensor = found.rows.cpu().double()
        return kept

    ours, reference = rows(device), rows(torch.device("cpu"))
    scale = reference.norm(dim=1, keepdim=True).expand_as(reference)
    assert_within(ours, reference, scale, 1e-5, "rows")  # stored in float32
