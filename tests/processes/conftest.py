"""Two processes, started once for all tests of a subject in a worker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from process_kit import succeed_together
from tests.processes.oracle import WORLD


def started(folder: Path, subject: str) -> list[dict[str, Any]]:
    """Return what each of two processes found of a subject."""
    command = [sys.executable, "-m", "tests.processes.worker"]
    succeed_together([[*command, str(rank), str(folder), subject] for rank in range(WORLD)])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes found whose samples meet directions alone."""
    folder = tmp_path_factory.mktemp("processes")
    both = started(folder, "apart")
    (folder / "logs").rename(tmp_path_factory.getbasetemp() / "logs")
    return both


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what they found of concatenated mode and of the second order."""
    return started(tmp_path_factory.mktemp("joined"), "together")
