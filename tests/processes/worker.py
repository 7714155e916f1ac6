"""One of two processes: runs all cases and writes what it found as JSON.

python -m tests.processes.worker RANK FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tests.processes import sharded
from tests.processes.training import DDP, FSDP, train
from tests.processes.wrapped import UNEVEN, faulty, others, refusals
from torch import distributed

WORLD = 2


def run(rank: int) -> dict[str, Any]:
    """Return what this process found, by subject."""
    return {
        "runs": _runs(rank),
        "others": others(rank),
        "faults": faulty(rank),
        "refusals": refusals(rank),
        "sharded": {
            "others": sharded.others(rank),
            "faults": sharded.faulty(rank),
            "refusals": sharded.refusals(rank),
        },
    }


def _runs(rank: int) -> dict[str, Any]:
    return {
        case.name: {
            "plain": train(case, rank, ghost=False),
            "wrapper": train(case, rank, ghost=True),
            "inside": train(case, rank, ghost=True, how="inside"),
        }
        for case in DDP
    } | {
        case.name: {
            "plain": train(case, rank, ghost=False),
            "wrapper": train(case, rank, ghost=True),
        }
        for case in FSDP
    }


def main(rank: int, folder: Path) -> None:
    """Join the other process, run, and write."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        (folder / f"{rank}.json").write_text(json.dumps(run(rank)))
        train(UNEVEN, rank, ghost=True, log=folder / "logs" / str(rank))
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
