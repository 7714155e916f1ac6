"""One of two processes: runs all cases and writes what it found as JSON.

python -m tests.processes.worker RANK FOLDER SUBJECT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from process_kit import take_part
from tests.processes import drawn, joined, sharded
from tests.processes.training import CURVED, DDP, FSDP, JOINED, MADE, Case, train
from tests.processes.wrapped import UNEVEN, faulty, others, refusals


def apart(rank: int, folder: Path) -> dict[str, Any]:
    """Return what this process found where directions are closures and tensors."""
    train(UNEVEN, rank, ghost=True, log=folder / "logs" / str(rank))
    return {
        "runs": _runs(rank, DDP, "wrapper", "inside") | _runs(rank, FSDP, "wrapper"),
        "others": others(rank),
        "faults": faulty(rank),
        "refusals": refusals(rank),
        "sharded": {
            "others": sharded.others(rank),
            "faults": sharded.faulty(rank),
            "refusals": sharded.refusals(rank),
        },
    }


def together(rank: int, folder: Path) -> dict[str, Any]:
    """Return what it found in concatenated mode, and of the second order."""
    return {
        "runs": _runs(rank, [*JOINED, *CURVED, *MADE], "wrapper"),
        "others": joined.others(rank),
        "faults": joined.faulty(rank),
        "refusals": joined.refusals(rank),
    }


def ways(rank: int, _: Path) -> dict[str, Any]:
    """Return what it found in concatenated mode, on layers of its own."""
    return {"drawn": drawn.run(rank)}


SUBJECTS = {"apart": apart, "together": together, "drawn": ways}


def _runs(rank: int, cases: Sequence[Case], *hows: str) -> dict[str, Any]:
    return {
        case.name: {
            "plain": train(case, rank, ghost=False),
            **{how: train(case, rank, ghost=True, how=how) for how in hows},
        }
        for case in cases
    }


def main(rank: int, folder: Path, subject: str) -> None:
    """Join the other process, run, and write."""
    torch.set_num_threads(1)

    def work() -> None:
        found = SUBJECTS[subject](rank, folder)
        (folder / f"{rank}.json").write_text(json.dumps(found))

    take_part(rank, folder, work, timeout=timedelta(seconds=100))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
