"""How much memory a pass over a data set takes beside plain training, in processes of their own."""

import os
import subprocess
import sys

import pytest
from memory_kit import KIT

PROGRAM = """
import sys, tempfile
import torch
from memory_kit import kib
from torch import nn
from ghost_engines import ProjectionEngine, project_dataset

torch.set_num_threads(1)
torch.manual_seed(0)
way, (width, tokens), layers, n = sys.argv[1], map(int, sys.argv[2:]), 6, 8
model = nn.Sequential(*(
    part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())
))
batches = [torch.randn(n, tokens, width) for _ in range(4)]
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
engine = ProjectionEngine(model, dim=(16, 16), layers="*.weight", verify=way == "first in training")

def losses(model, batch):
    return model(batch).square().mean((1, 2))

def train(batch):
    optimizer.zero_grad()
    losses(model, batch).mean().backward()
    optimizer.step()

def train_projected(batch):
    optimizer.zero_grad()
    with engine.batch(range(n)):
        losses(model, batch).mean().backward()
    optimizer.step()
    engine.collect()

before = kib("VmRSS")
with tempfile.TemporaryDirectory() as folder:
    if way == "project_dataset":
        project_dataset(model, losses, batches, folder, dim=(16, 16), layers="*.weight")
    elif "in training" in way:
        with engine:
            for batch in batches:
                train_projected(batch)
    else:
        for batch in batches:
            train(batch)
print(kib("VmHWM") - before)
"""


def peak(way, width, tokens):
    """Return the most MiB that a process ever had, beyond what it had before."""
    # What is freed goes back to the system at once, or holes in the heap would count too.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way, str(width), str(tokens)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        cwd=KIT,
    )
    return int(done.stdout) / 1024


CODE = 20
"""MiB of what a projection loads, of the store and its thread as well."""


@pytest.mark.stress
@pytest.mark.parametrize(("width", "tokens"), [(1536, 64), (512, 512)], ids=["wide", "long"])
def test_a_pass_takes_no_more_than_training_without_momentum_does(width, tokens):
    plain = peak("plain", width, tokens)
    gradients = 6 * width**2 * 4 / 2**20
    assert peak("project_dataset", width, tokens) <= plain + max(0, CODE - gradients)
    assert peak("in training", width, tokens) <= plain + CODE
    # In the batch that is verified, sums over samples are compared with autograd's.
    assert peak("first in training", width, tokens) <= plain + gradients + CODE
