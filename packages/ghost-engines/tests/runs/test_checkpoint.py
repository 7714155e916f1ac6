"""Processes that were killed at different moments go on from the same step."""

from __future__ import annotations

import errno
import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from ghost_core import CaptureError
from ghost_engines.runs import checkpoint
from ghost_engines.runs.checkpoint import last_common, read_state, write_state
from ghost_engines.runs.folder import RunFolder


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([[]], None),
        ([[4]], 4),
        ([[2, 4], [4, 6]], 4),
        ([[2, 4], [2, 4]], 4),
        ([[2], []], None),  # killed between the first checkpoint of one and of the other
        ([[2, 4], [2]], 2),
    ],
)
def test_the_last_step_that_all_have_is_gone_on_with(
    steps: list[list[int]], expected: int | None
) -> None:
    assert last_common(steps) == expected


@pytest.mark.parametrize("steps", [[[2, 4], []], [[2], [4]], [[2, 4], [6, 8]]])
def test_what_cannot_come_of_being_killed_is_refused(steps: list[list[int]]) -> None:
    with pytest.raises(CaptureError, match="no checkpoint of the same step"):
        last_common(steps)


@pytest.mark.parametrize("damage", ["cut short", "replaced"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_state(path, {"numbers": torch.arange(1000)})
    assert read_state(path)["numbers"].sum() == 499500
    path.write_bytes(path.read_bytes()[:500] if damage == "cut short" else b"junk")
    with pytest.raises(
        CaptureError, match=r"checkpoint\.pt is no checkpoint, or damaged"
    ) as caught:
        read_state(path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("fails", ["here", "there"])
def test_all_processes_hear_that_one_cannot_go_on(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None waits for what another one does not say."""
    told: list[object] = []

    def gather(found: list[object], mine: object) -> None:
        told.append(mine)
        found[:] = [mine, None if fails == "there" else []]

    monkeypatch.setattr(checkpoint, "several", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    (tmp_path / "checkpoint.pt").write_text("junk")
    if fails == "there":
        (tmp_path / "checkpoint.pt").unlink()
    message = "damaged" if fails == "here" else "another process cannot go on"
    with pytest.raises(CaptureError, match=message):
        checkpoint.read_checkpoint(tmp_path, lambda: None)
    assert told == [None if fails == "here" else []]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 5, 25, 39])
def test_a_full_disk_or_an_interrupt_is_one_and_leaves_the_last_one(
    at: int, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch makes errors of its own of some."""
    real, calls = os.fdopen, count(1)
    raised = kind(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        def __init__(self, *arguments: Any) -> None:
            self._file = real(*arguments)

        def write(self, data: bytes) -> int:
            if next(calls) == at:
                raise raised
            return self._file.write(data)

        def flush(self) -> None:
            self._file.flush()

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    path = tmp_path / "checkpoint.pt"
    write_state(path, {"numbers": torch.arange(3)})
    monkeypatch.setattr(os, "fdopen", Full)
    try:
        raise KeyError  # which whoever saves may have met before
    except KeyError:
        with pytest.raises(kind) as caught:
            write_state(path, {"numbers": torch.arange(100_000), "more": torch.ones(3)})
    assert caught.value is raised
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert read_state(path)["numbers"].tolist() == [0, 1, 2]


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CaptureError, match="run is a file; a run writes a folder"):
        RunFolder.open(tmp_path / "run", {}, after=None, logs=True)
