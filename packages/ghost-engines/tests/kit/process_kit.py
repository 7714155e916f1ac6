"""Process groups of one, and several processes that work together."""

import subprocess
from contextlib import contextmanager

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


def run_together(commands, **options):
    """Run commands at the same time to their ends, and demand that none fails."""
    running = [
        subprocess.Popen(each, stderr=subprocess.PIPE, text=True, **options) for each in commands
    ]
    try:
        said = [each.communicate(timeout=300)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert not any(each.returncode for each in running), "\n".join(said)
