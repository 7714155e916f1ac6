"""The command that runs these tests on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_device_nothing_passes(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cuda:99"])
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("something ran"))
    assert gpu.main() == 2
    assert "nothing was checked: there is no device 'cuda:99' here" in capsys.readouterr().err


def test_plugins_are_known_without_being_installed(gpu: Any, tmp_path: Path) -> None:
    gpu.declare(tmp_path)
    code = (
        "from importlib.metadata import entry_points\n"
        "print(*sorted(each.name for each in entry_points(group='ghost')))"
    )
    path = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "engines layers\n"


@pytest.mark.parametrize("failing", ["pytest", "bench"])
def test_a_failure_is_the_commands_own(
    gpu: Any, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(arguments: list[str], env: dict[str, str]) -> bool:
        ran.append((arguments, env))
        return arguments[1] == failing

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "-x"])
    assert gpu.main() == 1
    (tests, env), (bench, _) = ran
    assert tests[-1] == "-x"
    assert env["GHOST_TEST_DEVICE"] == "cpu"
    assert bench == ["-m", "bench", "--device", "cpu"]
