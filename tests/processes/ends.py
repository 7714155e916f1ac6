"""One of two processes, the second of which comes to an end inside of a batch.

python -m tests.processes.ends RANK FOLDER HOW
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from process_kit import take_part
from tests.processes.training import held_out, losses, net, samples
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ghost_engines import DotProductEngine

APART = "CaptureError: the 2 processes do not go through this batch together"
GONE = "RuntimeError"

BATCHES = 3


def _killed(_: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fails(_: Tensor) -> None:
    raise ZeroDivisionError("a hook of the user's failed")


HOWS: Mapping[str, tuple[Callable[[Tensor], None], bool, str]] = {
    "killed": (_killed, False, GONE),
    "fails": (_fails, False, APART),
    "killed, sharded": (_killed, True, GONE),
    "fails, sharded": (_fails, True, GONE),
}
"""What the second does in its backward pass, whether parameters are in parts, and what the first
then says."""


def run(rank: int, how: str) -> None:
    """Train, until one of them ends."""
    ends, shards, _ = HOWS[how]
    model = net()
    if shards:
        fully_shard(model.trunk)
    wrapped = fully_shard(model) if shards else DistributedDataParallel(model)
    engine = DotProductEngine(wrapped, mode="concatenated")
    with engine:
        for batch in range(BATCHES):
            both = engine.concatenate(samples()[:4], held_out()[:2])
            with engine.batch(range(4)):
                given = both.requires_grad_()
                if rank and batch == BATCHES - 1:
                    given.register_hook(ends)  # the last that its backward pass comes to
                found = losses(wrapped(given))
                engine.backward(found, train_weight=1 / 4, validation_weight=1 / 2)


def main(rank: int, folder: Path, how: str) -> None:
    """Join the other process, and train."""
    torch.set_num_threads(1)
    take_part(rank, folder, partial(run, rank, how), timeout=timedelta(seconds=100))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
