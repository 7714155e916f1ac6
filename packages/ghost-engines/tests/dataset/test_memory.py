"""How much memory a pass over a data set takes beside plain training, in processes of their own."""

import pytest
from memory_kit import printed

PROGRAM = """
import sys, tempfile
from pathlib import Path
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
options = {"dim": (16, 16), "layers": "*.weight"}
engine = ProjectionEngine(model, **options, verify=way == "first in training")

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

def go(batches, folder):
    if way == "project_dataset":
        project_dataset(model, losses, batches, folder, **options)
    elif way == "plain":
        for batch in batches:
            train(batch)
    else:
        with engine:
            for batch in batches:
                train_projected(batch)

with tempfile.TemporaryDirectory() as folder:
    go([torch.randn(n, 1, width)], folder + "/a")  # which loads the code
    optimizer.zero_grad()
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most that it has is counted anew
    go(batches, folder + "/b")
print(kib("VmHWM") - before)
"""


def peak(way, width, tokens):
    """Return the most MiB that a process had, beyond what it had once all code was loaded."""
    return printed(PROGRAM, way, width, tokens) / 1024


ROOM = 3
"""MiB for rows, the store and its thread."""


@pytest.mark.stress
@pytest.mark.parametrize(("width", "tokens"), [(1536, 64), (512, 512)], ids=["wide", "long"])
def test_a_pass_holds_compressed_inputs_beside_what_training_without_momentum_does(width, tokens):
    plain = peak("plain", width, tokens)
    gradients, compressed = 6 * width**2 * 4 / 2**20, 6 * 8 * tokens * 16 * 4 / 2**20
    assert peak("project_dataset", width, tokens) <= plain + compressed + ROOM
    assert peak("in training", width, tokens) <= plain + compressed + ROOM
    # In the batch that is verified, sums over samples are compared with autograd's.
    assert peak("first in training", width, tokens) <= plain + gradients + compressed + ROOM


@pytest.mark.stress
def test_a_pass_makes_no_gradients_of_weights():
    width, tokens = 1536, 64
    gradients = 6 * width**2 * 4 / 2**20
    assert peak("project_dataset", width, tokens) <= peak("plain", width, tokens) - gradients / 3
