"""Process groups of one, and several processes that work together."""

import os
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def group_of_one():
    """Be a process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def take_part(rank, folder, work, **options):
    """Be one of two processes that work, and end with it.

    Python does not end here by itself: gloo's threads abort it if they let a tensor go meanwhile,
    and caches of torch hold them, those of sharded tensors whatever one destroys.
    """
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, **options
    )
    status = 1
    try:
        work()
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_together(commands, **options):
    """Run commands at the same time to their ends; return the status of each, and what it said."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    options = {"stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": path}, **options}
    running = [subprocess.Popen(each, text=True, **options) for each in commands]
    try:
        said = [each.communicate(timeout=300)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    return [(each.returncode, words) for each, words in zip(running, said, strict=True)]


def succeed_together(commands, **options):
    """Run commands at the same time to their ends, and demand that none fails."""
    ended = run_together(commands, **options)
    assert not any(status for status, _ in ended), "\n".join(said for _, said in ended)
