"""States on disk, and the checkpoint of a run, of which all processes read the same step."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ghost_core import CaptureError
from ghost_engines.files import written_atomically
from ghost_engines.processes import process_count

CHECKPOINT = "checkpoint.pt"
BEFORE = "checkpoint-before.pt"
"""The one before, where there are several processes: they are not killed at the same moment."""

State = dict[str, Any]


def several() -> bool:
    """Tell whether this is one of several processes that train together."""
    return process_count() > 1


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state of tensors and numbers into a folder that is there, or replace it.

    It is written bit by bit: memory is taken for one tensor at a time.

    Raises:
        OSError: If that fails; then the file, or its absence, is as it was.
    """
    handled = sys.exc_info()[1]  # by the caller
    with written_atomically(path) as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            # Torch ends its archive whatever was raised in the middle, and then raises that the
            # archive is not whole, in the place of a full disk or of an interrupt.
            before = error.__context__
            if before is None or before is handled:
                raise
            raise before from None


def read_state(path: Path) -> State:
    """Return a state, on the CPU.

    Raises:
        CaptureError: If there is no such file, or it is damaged.
        OSError: If it cannot be read.
    """
    if not path.exists():
        raise CaptureError(
            f"{path} is not there",
            reason="the checkpoint was saved without ghost, or is not whole",
            remedy="resume from another one, or begin a run anew",
        )
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises what its parts happen to
        raise CaptureError(
            f"{path} is no checkpoint, or damaged",
            reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="restore the file from a copy, or remove it and begin anew",
        ) from error
    return state


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write or replace the checkpoint in a folder.

    Raises:
        OSError: If that fails; then the last one is still there.
    """
    if several() and (folder / CHECKPOINT).exists():
        os.replace(folder / CHECKPOINT, folder / BEFORE)
    write_state(folder / CHECKPOINT, state)


def read_checkpoint(folder: Path, lock: Callable[[], object]) -> State | None:
    """Return the last checkpoint that each process has, on the CPU, or None if there is none.

    Where a process fails, all others hear of it before they wait for it.

    Args:
        folder: The folder of this process.
        lock: Locks it, so that nobody writes meanwhile.

    Raises:
        CaptureError: If processes have checkpoints, and no step is among all of them, or another
            process fails.
        StoreError: If another writer has the folder open.
    """
    by_step: dict[int, State] = {}
    failure: Exception | None = None
    try:
        lock()
        by_step = _by_step(folder)
    except Exception as error:  # raised below, once it was told
        failure = error
    steps: list[Sequence[int] | None] = [sorted(by_step)]
    if several():
        steps *= distributed.get_world_size()
        distributed.all_gather_object(steps, None if failure else sorted(by_step))
    if failure is not None:
        raise failure
    known = [each for each in steps if each is not None]
    if len(known) < len(steps):
        raise CaptureError(
            "another process cannot go on from its checkpoint",
            reason="it has raised what is wrong",
            remedy="see its log",
        )
    step = last_common(known)
    return None if step is None else by_step[step]


def _by_step(folder: Path) -> dict[int, State]:
    """Return the checkpoints of a folder by the number of their step."""
    files = [folder / name for name in (CHECKPOINT, BEFORE) if (folder / name).exists()]
    return {
        state["run"]["steps"]: state for state in reversed([read_state(each) for each in files])
    }


def last_common(steps: Sequence[Sequence[int]]) -> int | None:
    """Return the last step that all processes have a checkpoint of, or None to begin.

    Args:
        steps: Those that each process has. Steps are made together, so that no process is more than
            one checkpoint ahead: where one has none yet, the others have one at most.

    Raises:
        CaptureError: If there is none that all have, and that cannot come of being killed.
    """
    common = set.intersection(*map(set, steps))
    if common:
        return max(common)
    if any(len(each) > 1 for each in steps) or all(steps):
        raise CaptureError(
            f"the processes have no checkpoint of the same step: {[list(each) for each in steps]}",
            reason="files were removed, or are of another number of processes",
            remedy="begin a run in another folder",
        )
    return None
