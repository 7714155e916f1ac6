"""Processes that were killed at different moments go on from the same step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ghost_core import CaptureError
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


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CaptureError, match="run is a file; a run writes a folder"):
        RunFolder.open(tmp_path / "run", {}, after=None, logs=True)
