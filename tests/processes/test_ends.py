"""No process waits for ever for one that came to an end inside of a batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.processes.ends import HOWS


@pytest.mark.stress
@pytest.mark.parametrize("how", HOWS)
def test_the_other_process_ends_with_an_error(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.processes.ends"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), how], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [each.communicate(timeout=300)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert running[0].returncode == 1
    assert HOWS[how][2] in said[0]
    assert running[1].returncode == (1 if "fails" in how else -9)
    assert ("a hook of the user's failed" in said[1]) == ("fails" in how)
