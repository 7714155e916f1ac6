"""Two processes, started once for all tests of a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from tests.processes.oracle import WORLD


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.processes.worker"]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        said = [each.communicate(timeout=300)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert not any(each.returncode for each in running), "\n".join(said)
    (folder / "logs").rename(tmp_path_factory.getbasetemp() / "logs")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
