"""The training of language models in processes that are killed, alone and together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ghost_examples.language_models import Cut, metrics, open_tokenizer, write_domain
from ghost_examples.texts import load_domain

pytestmark = pytest.mark.stress

SCRIPT = Path(__file__).parents[1] / "src/ghost_examples/slurm/lm_training.sh"
FILES = ("values.csv", "domains.csv", "passages.md")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of some seconds, without the folder of its results."""
    corpus = tmp_path_factory.mktemp("corpus")
    for name in ("python", "scripture"):
        cut = Cut(16, 4, by_block=True)
        text = load_domain(name)[:6000]
        write_domain(corpus, name, [text], open_tokenizer("embedded"), cut)
    small = "--steps 24 --batch 2 --validation 1 --save-every 2 --eval-every 6 --eval-blocks 2"
    return f"--corpus {corpus} {small} --device cpu --dropout 0.1 --shown 1".split()


def alone(results: Path, arguments: list[str]) -> list[str]:
    command = [sys.executable, "-m", "ghost_examples.lm_training"]
    return [*command, *arguments, "--results-dir", str(results)]


def together(results: Path, arguments: list[str], *options: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--standalone", *options, "-m", "ghost_examples.lm_training"]
    return [*command, *arguments, "--results-dir", str(results)]


def killed_after(command: list[str], checkpoint: Path) -> None:
    """Start a run, and kill all of its processes once there is a checkpoint."""
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not checkpoint.exists():
            assert process.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("method", ["concatenated", "fused"])
def test_two_processes_join_their_samples(
    tmp_path: Path, arguments: list[str], method: str
) -> None:
    command = together(tmp_path, [*arguments, "--method", method])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = np.genfromtxt(tmp_path / "values.csv", delimiter=",", names=True)
    assert rows["times_seen"].sum() == 24 * 2 * 2
    columns = [name for name in rows.dtype.names if name.startswith("value")]
    assert all(np.isfinite(rows[name]).all() and rows[name].any() for name in columns)
    assert len(columns) == (1 if method == "concatenated" else 2)


def check_same(found: Path, whole: Path, folder: str) -> None:
    for name in FILES:
        assert (found / name).read_bytes() == (whole / name).read_bytes(), name
    curves = metrics.read_curves(found / folder)
    assert len(curves.train) == 24
    assert curves == metrics.read_curves(whole / folder)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, arguments: list[str]) -> None:
    whole, found = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(alone(whole, arguments), check=True, stdout=subprocess.DEVNULL)
    killed_after(alone(found, arguments), found / "run/checkpoint.pt")
    assert not (found / "values.csv").exists()
    subprocess.run(alone(found, arguments), check=True, stdout=subprocess.DEVNULL)
    check_same(found, whole, "run")


def test_two_processes_that_are_killed_go_on(tmp_path: Path, arguments: list[str]) -> None:
    whole, found = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(together(whole, arguments), check=True, stdout=subprocess.DEVNULL)
    killed_after(together(found, arguments), found / "run/rank-1/checkpoint-before.pt")
    subprocess.run(together(found, arguments), check=True, stdout=subprocess.DEVNULL)
    check_same(found, whole, "run/rank-0")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_of_the_process_group_outlives_the_run(
    tmp_path: Path, arguments: list[str]
) -> None:
    """Torch's gloo aborts a process whose interpreter ends before its threads do."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, sys\n"
        "from ghost_examples.lm_training import main\n"
        "main(sys.argv[1:])\n"
        "names = [each.read_text() for each in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "pathlib.Path(f'threads-{os.environ[\"RANK\"]}').write_text(''.join(names))\n"
    )
    command = together(tmp_path / "run", [*arguments, "--method", "concatenated"])
    command[command.index("-m", 4) : command.index("-m", 4) + 2] = [str(worker)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)
    for rank in range(2):
        names = (tmp_path / f"threads-{rank}").read_text()
        assert "python" in names
        assert "gloo" not in names


def test_torchrun_restarts_what_was_killed(tmp_path: Path, arguments: list[str]) -> None:
    """One of two processes is killed; torchrun ends the other, and starts both anew."""
    arguments = [*arguments, "--corpus", "embedded", "--length", "64"]
    whole, found = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(together(whole, arguments), check=True, stdout=subprocess.DEVNULL)
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys\n"
        "from ghost_examples.language_models import training\n"
        "from ghost_examples.lm_training import main\n"
        "class Dies(training.Pace):\n"
        "    def stepped(self, step, loss):\n"
        "        first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "        if first and step == 13 and os.environ['RANK'] == '1':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        super().stepped(step, loss)\n"
        "training.Pace = Dies\n"
        "main(sys.argv[1:])\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--standalone", "--max-restarts", "1", str(worker), *arguments]
    # Torch's gloo finds the addresses of the killed processes in a store that restarts share.
    apart = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command += ["--results-dir", str(found)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=apart)
    check_same(found, whole, "run/rank-0")


def test_two_processes_find_what_one_finds(tmp_path: Path, arguments: list[str]) -> None:
    """On the same samples: one process has batches, and validation samples, of both."""
    same = [each for each in arguments if each not in ("--dropout", "0.1")]
    subprocess.run(together(tmp_path / "two", same), check=True, stdout=subprocess.DEVNULL)
    doubled = [*same, "--batch", "4", "--validation", "2"]
    subprocess.run(alone(tmp_path / "one", doubled), check=True, stdout=subprocess.DEVNULL)
    one = metrics.read_curves(tmp_path / "one/run").train
    two = metrics.read_curves(tmp_path / "two/run/rank-0").train
    assert list(one) == list(two)
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)
    tables = []
    for name in ("one", "two"):
        _, *lines = (tmp_path / name / "values.csv").read_text().splitlines()
        rows = [[float(each) for each in line.split(",")] for line in lines]
        tables.append({row[0]: row[1:3] for row in rows})
    assert tables[0].keys() == tables[1].keys()
    largest = max(abs(each) for row in tables[0].values() for each in row)
    for sample, row in tables[0].items():
        assert row == pytest.approx(tables[1][sample], abs=1e-2 * largest)


SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    started+=($!)
done
for each in "${started[@]}"; do wait "$each" || failed=1; done
exit ${failed:-0}
"""
"""Starts a task on each node, all of which are this machine, and waits for all."""


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (2, 1)])
def test_the_script_for_slurm_trains(
    nodes: int, per_node: int, tmp_path: Path, arguments: list[str]
) -> None:
    """With programs in the place of SLURM's that do what these do, on one machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fakes = {
        "srun": SRUN,
        "scontrol": "echo localhost",
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in fakes.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": str(per_node),
        "GHOST_PORT": str(free_port()),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    results = tmp_path / "results"
    options = [*arguments, "--corpus", "embedded", "--length", "64"]
    command = ["bash", str(SCRIPT), *options, "--results-dir", str(results)]
    done = subprocess.run(
        command, env={**os.environ, **job}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 24/24") == 1  # of the first process alone
    assert {"rank-0", "rank-1"} <= {each.name for each in (results / "run").iterdir()}
    assert (results / "values.csv").exists()


def free_port() -> int:
    """Return a port below those that the system gives out, so that nobody else gets it."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("", port))
            return port
    raise AssertionError("no port is free")
