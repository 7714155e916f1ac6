"""Processes that were killed at different moments go on from the same step."""

from __future__ import annotations

import pytest

from ghost_core import CaptureError
from ghost_engines.runs.checkpoint import last_common


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
