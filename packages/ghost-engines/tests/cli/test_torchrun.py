"""`ghost project` under torchrun: a process that is killed, and started again."""

import os
import subprocess
import sys

import pytest

from ghost_engines import GradientStore

pytestmark = pytest.mark.stress

SUBJECTS = """
import os
import signal
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset


def model():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(200, 5, generator=generator), torch.arange(200) % 3)


calls = 0


def loss(model, batch):
    global calls
    calls += 1
    fatal = Path(os.environ["FATAL"])
    if fatal.exists() and os.environ["RANK"] == "1" and calls == int(fatal.read_text()):
        fatal.unlink()  # it happens once
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def torchrun(folder, store, fatal):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "--max-restarts", "2", "-m", "ghost_engines", "project", "subjects:model",
        "--data", "subjects:data", "--loss", "subjects:loss", "--store", store,
        "--unit", "20", "--batch-size", "5", "--dim", "8", "--min-dim", "1",
    ]  # fmt: skip
    (folder / "subjects.py").write_text(SUBJECTS)
    environment = {**os.environ, "FATAL": str(fatal), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return GradientStore.open(folder / store)


def files(root):
    return {
        path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))
    }


@pytest.mark.parametrize("call", [1, 7, 18])
def test_a_killed_process_is_started_again_and_nothing_tells(call, tmp_path):
    torchrun(tmp_path, "whole", tmp_path / "never")
    (tmp_path / "fatal").write_text(str(call))
    store = torchrun(tmp_path, "killed", tmp_path / "fatal")
    assert not (tmp_path / "fatal").exists()
    assert store.ids.tolist() == list(range(200))
    store.verify()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
