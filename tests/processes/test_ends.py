"""No process waits for ever for one that came to an end inside of a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from process_kit import run_together
from tests.processes.ends import HOWS


@pytest.mark.stress
@pytest.mark.parametrize("how", HOWS)
def test_the_other_process_ends_with_an_error(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.processes.ends"]
    first, second = run_together([[*command, str(rank), str(tmp_path), how] for rank in range(2)])
    assert first[0] == 1
    assert HOWS[how][2] in first[1]
    assert second[0] == (1 if "fails" in how else -9)
    assert ("a hook of the user's failed" in second[1]) == ("fails" in how)
