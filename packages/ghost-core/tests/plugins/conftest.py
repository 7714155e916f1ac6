"""Distributions with plugins, written into a folder, and what is discovered there."""

import sys
from collections.abc import Callable
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path

import pytest

from ghost_core.plugins import DISABLED_VARIABLE, Contributions, collect

HEADER = """
from torch import nn
from ghost_core import Engine, Override, Projection, hookimpl
from ghost_core.testing import PlainEmbedding, PlainLinear, GradientHolder

class Ones(Projection):
    def draw(self, k, n, generator):
        return generator.ones(k, n)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Write a distribution with a plugin into a folder of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(DISABLED_VARIABLE, raising=False)

    def write(distribution: str, code: str, entry: str = "plugin", version: str = "1.2") -> None:
        module = distribution.replace("-", "_") + "_" + entry
        (tmp_path / f"{module}.py").write_text(HEADER + code)
        monkeypatch.delitem(sys.modules, module, raising=False)
        folder = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        with (folder / "entry_points.txt").open("a") as file:
            if file.tell() == 0:
                file.write("[ghost]\n")
            file.write(f"{entry} = {module}\n")

    return write


@pytest.fixture
def found(tmp_path: Path) -> Callable[[], list[tuple[Distribution, EntryPoint]]]:
    def entries() -> list[tuple[Distribution, EntryPoint]]:
        return [
            (distribution, entry)
            for distribution in distributions(path=[str(tmp_path)])
            for entry in distribution.entry_points.select(group="ghost")
        ]

    return entries


@pytest.fixture
def discover(found: Callable[[], list[tuple[Distribution, EntryPoint]]]):
    def run() -> Contributions:
        return collect(found())

    return run
