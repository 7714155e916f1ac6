"""Wrapped optimizers and sharded parameters, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import os, sys, torch, torch.distributed
from torch import nn
from ghost_core import GhostError
from ghost_core.testing import GradientHolder, per_sample_gradients
from ghost_engines import DotProductEngine, InRunValues

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
x = torch.randn(4, 3, dtype=torch.float64)

def losses():
    return model(x).square().sum(1)
"""

END = """
except GhostError as error:
    print('refused', error)
sys.stdout.flush()
os._exit(0)  # the threads of a group that there is still may abort Python where it ends
"""

ACCELERATE = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
engine = DotProductEngine(model)
engine.add_direction("validation", lambda: losses().mean())
with InRunValues(engine, optimizer) as values, engine:
    for _ in range(2):
        optimizer.zero_grad()
        with engine.batch(range(4)):
            accelerator.backward(losses().sum())
        optimizer.step()
assert values.steps == 2 and len(values) == 4
"""

SHARDED = """
from torch.distributed.fsdp import fully_shard
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
expected = per_sample_gradients(model, losses())
for layer in (0, 1, 3):
    fully_shard(model[layer])
fully_shard(model)
"""

BATCH = """
engine = GradientHolder(model)
with {how}, engine.batch(range(4)) as batch:
    losses().sum().backward()
for name, held in batch.result.materialize().items():
    assert torch.allclose(held, expected[name], rtol=1e-9, atol=1e-12), name
print("exact")
"""

DIRECTION = """
engine = DotProductEngine(model)
engine.add_direction("validation", lambda: losses().mean())
with engine, engine.batch(range(4)) as batch:
    losses().sum().backward()
mean = {name: each.mean(0) for name, each in expected.items()}
dots = sum((expected[name] * mean[name]).flatten(1).sum(1) for name in expected)
assert torch.allclose(batch.result.total.flatten(), dots, rtol=1e-9)
print("exact")
"""

VERIFY = """
GradientHolder(model).verify(losses).raise_if_wrong()
"""

BESIDE = """
from torch.distributed.fsdp import fully_shard
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
expected = per_sample_gradients(model, losses(), ["3.weight", "3.bias"])
fully_shard(model[0])
engine = GradientHolder(model, layers="3")
with {how}, engine.batch(range(4)) as batch:
    losses().sum().backward()
for name, held in batch.result.materialize().items():
    assert torch.allclose(held, expected[name], rtol=1e-9, atol=1e-12), name
print("exact")
"""

CODE = {
    "accelerate's optimizer": ACCELERATE,
    "sharded blocks": SHARDED + BATCH.format(how="engine"),
    "sharded blocks, frozen": SHARDED + BATCH.format(how="engine.frozen()"),
    "sharded blocks, direction": SHARDED + DIRECTION,
    "beside a sharded block": BESIDE.format(how="engine"),
    "beside a sharded block, frozen": BESIDE.format(how="engine.frozen()"),
    "sharded blocks, verify": SHARDED + VERIFY,
}


REFUSED = {
    "sharded blocks, frozen": "frozen()",
    "sharded blocks, verify": "engine.verify",
}


@pytest.mark.stress
@pytest.mark.parametrize("name", CODE)
def test_exact_or_refused(name: str) -> None:
    pytest.importorskip("accelerate")
    body = "\n    ".join(CODE[name].splitlines())
    code = f"{START}\ntry:\n    {body}\n{END}"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr.splitlines()[-1]
    if name in REFUSED:
        assert ran.stdout.startswith(f"refused {REFUSED[name]} is not for a model under fully_")
        assert "Remedy: " in ran.stdout
    elif name != "accelerate's optimizer":
        assert ran.stdout == "exact\n"
