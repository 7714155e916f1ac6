"""What the modes add to the memory of plain training: peak size of a process of its own."""

import pytest
import torch
from memory_kit import printed

from ghost_core import CaptureError
from ghost_core.testing import next_token_losses
from ghost_engines import DotProductEngine

WIDTH, LAYERS, N, M, T = 1536, 6, 8, 2, 64
PARAMETERS = LAYERS * WIDTH**2 * 4
LARGEST = WIDTH**2 * 4
ACTIVATIONS = (LAYERS + 1) * M * T * WIDTH * 4
FACTORS = LAYERS * M * T * 2 * WIDTH * 4

STEPS = f"""
import sys
import torch
from memory_kit import kib
from torch import nn
from ghost_engines import DotProductEngine, FactoredDirection

torch.set_num_threads(1)
torch.manual_seed(0)
mode = sys.argv[1]
layers = [nn.Linear({WIDTH}, {WIDTH}, bias=False) for _ in range({LAYERS})]
model = nn.Sequential(*layers)
inputs = torch.randn({N}, {T}, {WIDTH})

def step():
    model(inputs).square().mean().backward()

if mode == "plain":
    engine = DotProductEngine(model)  # whose code takes memory too
    with engine:
        pass
    for _ in range(3):
        model.zero_grad()
        step()
elif mode == "concatenated":
    engine = DotProductEngine(model, mode=mode, verify=False)
    others = torch.randn({M}, {T}, {WIDTH})
    with engine:
        for _ in range(3):
            model.zero_grad()
            both = engine.concatenate(inputs, others)
            with engine.batch(range({N})):
                losses = model(both).square().mean((1, 2))
                engine.backward(losses, train_weight=1 / {N}, validation_weight=1 / {M})
elif mode in ("closure", "factors"):
    engine = DotProductEngine(model, verify=False)
    others = torch.randn({M}, {T}, {WIDTH})
    loss = lambda: model(others).square().mean()
    engine.add_direction("val", loss if mode == "closure" else FactoredDirection(loss, {M}))
    with engine:
        for _ in range(3):
            model.zero_grad()
            with engine.batch(range({N})):
                step()
else:
    engine = DotProductEngine(model, mode=mode, verify=False)
    direction = {{name: torch.ones(1).expand_as(p) for name, p in model.named_parameters()}}
    engine.add_direction("ones", direction)
    with engine:
        for _ in range(3):
            model.zero_grad()
            with engine.batch(range({N})):
                step()
print(kib("VmHWM") * 1024)
"""


def peak(mode):
    """Return the most bytes that a process ever had."""
    return printed(STEPS, mode)


@pytest.mark.stress
def test_what_modes_add_to_plain_training():
    plain, exact, fused = peak("plain"), peak("exact"), peak("fused")
    assert exact - plain <= 1.1 * PARAMETERS  # the direction
    assert fused - plain <= PARAMETERS + 3 * LARGEST  # and the samples in flight
    # The direction of one layer, the samples in flight, and what belongs to validation samples.
    assert peak("concatenated") - plain <= 3 * LARGEST + 2 * ACTIVATIONS


@pytest.mark.stress
def test_factors_take_the_place_of_a_direction():
    """Two validation samples, whose factors are a sixth of their gradient."""
    plain = peak("plain")
    assert peak("factors") - plain <= FACTORS + 2 * ACTIVATIONS + LARGEST
    assert peak("closure") - plain >= 0.9 * PARAMETERS


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_a_budget_changes_no_number(mode, transformer, tokens, draw_directions):
    found = []
    for budget in (None, 1):
        engine = DotProductEngine(transformer, mode=mode, norms=True, memory_budget=budget)
        for name, direction in draw_directions(transformer, 3).items():
            engine.add_direction(name, direction)
        with engine, engine.batch(range(5)) as batch:
            next_token_losses(transformer(tokens), tokens).sum().backward()
        found.append(batch.result)
    torch.testing.assert_close(found[0].total, found[1].total)
    torch.testing.assert_close(found[0].norms, found[1].norms)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_is_positive(budget, mlp):
    with pytest.raises(CaptureError, match="memory_budget must be a number of bytes"):
        DotProductEngine(mlp, memory_budget=budget)
